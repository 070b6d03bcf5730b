"""Attention layers whose q, k and v are looked up by token id: what a session can run and an oracle can tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..attention import AttentionParams
from ..kv_cache import Cache
from ..options import AttentionSpec
from ..reference.dtypes import torch_dtype
from ..step import StepInputs
from .held import Held, held, layer_scales, off_ties
from .oracle import F64, attention
from .session import Session


class Layers:
    """Every layer of a session's model. The value of a token is the sum of what they give: [Hq * Dv].

    All of a model's attention specs have the same Hq * Dv. Keys and values are of order `magnitude`.
    """

    def __init__(self, session: Session, *, seed: int = 0, magnitude: float = 1.0) -> None:
        self.session = session
        self.magnitude = magnitude
        self.model = session.launch.model
        self.dtype = torch_dtype(session.launch.options.dtype)
        generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self.specs: dict[int, AttentionSpec] = {}
        for spec in self.model.attention:
            for layer in self.model.groups[spec.group].layers:
                self.specs[layer] = spec
                self._add(layer, spec, generator)
                self._add_scales(layer)
        self.reader = session.reader(self._compute, self.tensors)

    def keys(self, layer: int, ids: Sequence[int]) -> Held:
        """[tokens, Hkv, D] as the cache should hold them."""
        return self._held("k", layer, ids)

    def values(self, layer: int, ids: Sequence[int]) -> Held:
        """[tokens, Hkv, Dv] as the cache should hold them."""
        return self._held("v", layer, ids)

    def expected(self, ids: Sequence[int], first: int) -> F64:
        """[len(ids) - first, Hq * Dv]: the values of the tokens from `first` on of the text `ids`."""
        found: F64 = np.sum([self._expected(layer, ids, first) for layer in self.specs], axis=0)
        return found

    def _expected(self, layer: int, ids: Sequence[int], first: int) -> F64:
        spec = self.specs[layer]
        q = self.tensors[f"q{layer}"][list(ids[first:])]
        found = attention(
            spec,
            _f64(q.reshape(-1, spec.num_heads, spec.head_size)),
            self.keys(layer, ids).worth,
            self.values(layer, ids).worth,
            first=first,
            sinks=_f64(self.tensors[f"sinks{layer}"]) if spec.sinks else None,
            alibi_slopes=_f64(self.tensors[f"slopes{layer}"]) if spec.alibi else None,
        )
        return found.reshape(len(found), -1)

    def _kv_dtype(self, layer: int) -> str:
        return self.model.groups[self.specs[layer].group].dtype

    def _held(self, name: str, layer: int, ids: Sequence[int]) -> Held:
        scale = self.tensors.get(f"{name}_scale{layer}")
        return held(
            self._by_head(layer, self.tensors[f"{name}{layer}"][list(ids)]),
            self._kv_dtype(layer),
            scale=1.0 if scale is None else scale.item(),
            fp8_max=self.session.launch.capabilities.fp8_max,
        )

    def _by_head(self, layer: int, x: Tensor) -> Tensor:
        """[tokens, Hkv * D] -> [tokens, Hkv, D]"""
        return x.reshape(len(x), self.specs[layer].num_kv_heads, -1)

    def _add(self, layer: int, spec: AttentionSpec, generator: torch.Generator) -> None:
        sizes = {
            "q": spec.num_heads * spec.head_size,
            "k": spec.num_kv_heads * spec.head_size,
            "v": spec.num_kv_heads * spec.value_size,
        }
        for name, size in sizes.items():
            table = torch.randn(self.model.vocab_size, size, generator=generator)
            table = (table if name == "q" else table * self.magnitude).to(self.dtype)
            if name != "q" and self._kv_dtype(layer) == "int8":
                table = off_ties(self._by_head(layer, table)).flatten(1)
            self.tensors[f"{name}{layer}"] = table
        if spec.sinks:
            sinks = torch.randn(spec.num_heads, generator=generator)
            self.tensors[f"sinks{layer}"] = sinks.to(self.dtype)
        if spec.alibi:
            # none that a plugin could work out for itself
            slopes = torch.rand(spec.num_heads, generator=generator)
            self.tensors[f"slopes{layer}"] = slopes * 0.5 + 0.02

    def _add_scales(self, layer: int) -> None:
        scales = layer_scales(layer, self._kv_dtype(layer))
        if scales is not None:
            for name, scale in zip("kv", scales, strict=True):
                self.tensors[f"{name}_scale{layer}"] = torch.tensor(scale)

    def _compute(self, ids: Tensor, inputs: StepInputs, cache: Cache) -> tuple[Tensor, Cache]:
        backend, tensor = self.session.backend, self.reader.get_buffer
        total: Tensor | None = None
        for layer, spec in self.specs.items():
            q, k, v = (tensor(f"{name}{layer}").index_select(0, ids) for name in "qkv")
            out, cache = backend.attention.attend(
                layer,
                spec,
                q.reshape(-1, spec.num_heads, spec.head_size),
                k.reshape(-1, spec.num_kv_heads, spec.head_size),
                v.reshape(-1, spec.num_kv_heads, spec.value_size),
                cache,
                inputs.attention,
                self._params(layer),
            )
            out = out.reshape(-1, spec.num_heads * spec.value_size)
            total = out if total is None else total + out
        assert total is not None
        return total, cache

    def _params(self, layer: int) -> AttentionParams:
        """As buffers of the reader."""

        def found(name: str) -> Tensor | None:
            name = f"{name}{layer}"
            return self.reader.get_buffer(name) if name in self.tensors else None

        return AttentionParams(
            sinks=found("sinks"),
            alibi_slopes=found("slopes"),
            key_scale=found("k_scale"),
            value_scale=found("v_scale"),
        )


def _f64(tensor: Tensor) -> F64:
    found: F64 = tensor.double().numpy()
    return found
