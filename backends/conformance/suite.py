"""What every suite of the kit stands on: the plugin under test, small models, and skips with a reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import pytest

from ..capabilities import Capabilities
from ..options import AttentionSpec, EngineOptions, KVGroup, ModelSpec
from ..plugin import Plugin
from ..registry import Registry
from .session import Session


class Suite:
    """Subclass it, and name an installed backend or override `make_plugin`."""

    backend: ClassVar[str] = ""
    """Name of the backend under test, as --backend takes it."""
    is_quick: ClassVar[bool] = False
    """Leave out the cases that `thorough` marks."""

    def make_plugin(self) -> Plugin:
        """The plugin under test."""
        return Registry.discover().select(self.backend).plugin

    @pytest.fixture
    def plugin(self) -> Plugin:
        """The plugin under test."""
        return self.make_plugin()

    @pytest.fixture
    def capabilities(self, plugin: Plugin) -> Capabilities:
        """What it says of this machine's devices."""
        return plugin.capabilities(plugin.probe())

    def thorough(self) -> None:
        """Skip the case that calls this in the quick selection."""
        if self.is_quick:
            pytest.skip("left out of the quick selection")

    def base_dtype(self, capabilities: Capabilities) -> str:
        """What cases run in that are not about dtypes: float32 where it is claimed."""
        return min(capabilities.dtypes, key=lambda name: (name != "float32", name))

    def require(self, condition: object, reason: str) -> None:
        """Skip with `reason`: what the backend does not claim is not held against it."""
        if not condition:
            pytest.skip(reason)


@contextmanager
def session(
    plugin: Plugin, model: ModelSpec, options: EngineOptions | None = None, *, num_blocks: int = 32
) -> Iterator[Session]:
    """A Session that is closed at the end."""
    opened = Session(plugin, model, options, num_blocks=num_blocks)
    try:
        yield opened
    finally:
        opened.close()


def small_model(
    attention: Sequence[AttentionSpec] = (),
    *,
    vocab_size: int = 128,
    max_context: int = 512,
    dtype: str = "float32",
    kv_dtype: str | None = None,
    layers_per_group: int = 1,
) -> ModelSpec:
    """A model that has one KV group for each of `attention` (default: one of two heads of 64) and no weights."""
    specs = tuple(attention) or (
        AttentionSpec(
            num_heads=2, num_kv_heads=1, head_size=64, value_size=64, scale=0.125, group=0
        ),
    )
    groups = tuple(
        KVGroup(
            kind="full" if spec.window is None else "sliding",
            layers=tuple(range(number * layers_per_group, (number + 1) * layers_per_group)),
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            value_size=spec.value_size,
            dtype=kv_dtype or dtype,
            window=spec.window,
        )
        for number, spec in enumerate(specs)
    )
    return ModelSpec(
        architecture="ConformanceForCausalLM",
        num_layers=len(groups) * layers_per_group,
        hidden_size=64,
        vocab_size=vocab_size,
        max_context=max_context,
        dtype=dtype,
        weight_bytes=0,
        groups=groups,
        attention=specs,
    )
