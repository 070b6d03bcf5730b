"""Compilers that compile nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..compiler import Compiler
from ..errors import UnexpectedCompile
from ..step import Prepared, StepInputs
from .staging import Staged, unpack


class EagerCompiler(Compiler):
    """Runs modules op by op; `unpack` makes StepInputs of what Backend.prepare made."""

    def __init__(self, unpack: Callable[[Any], StepInputs] = unpack) -> None:
        self.unpack = unpack

    def wrap(self, name: str, module: nn.Module) -> Callable[..., Any]:  # noqa: ARG002
        """Unpack, then call."""

        def run(prepared: Prepared, *rest: Any) -> Any:
            with torch.inference_mode():
                return module(self.unpack(prepared), *rest)

        return run


class BucketCompiler(EagerCompiler):
    """Runs op by op, and keeps the promise of devices that compile: what warm-up did not run is refused."""

    def __init__(self) -> None:
        super().__init__()
        self._is_frozen = False

    def wrap(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """See Compiler.wrap. Raises UnexpectedCompile before the module runs."""
        run = super().wrap(name, module)
        known: set[object] = set()

        def checked(staged: Staged, *rest: Any) -> Any:
            drawn = (staged.bucket.num_logits, staged.features)
            key = {"model": staged.bucket, "draw": drawn}.get(name, (staged.bucket, drawn))
            if self._is_frozen and key not in known:
                raise UnexpectedCompile(
                    f"{name} was not warmed up for {key}; warm up all that fit() may return"
                )
            known.add(key)
            return run(staged, *rest)

        return checked

    @contextmanager
    def freeze(self) -> Iterator[None]:
        """See Compiler.freeze."""
        self._is_frozen = True
        try:
            yield
        finally:
            self._is_frozen = False
