"""From a stream of tensors to a Decoder, with little more than one copy of the weights in memory at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ...backends.backend import Backend
from ...backends.options import AttentionSpec, ModelSpec
from ...backends.quantization import EmbeddingSpec, LinearSpec
from ..layers.attention import Attention
from ..layers.embedding import Embedding, Head
from ..layers.linear import RowParallel, build_linear, column_parallel, replicated, row_parallel
from ..layers.mlp import MLP
from ..layers.moe import MoE
from ..layers.norm import LayerNorm, Norm, RMSNorm
from ..layers.rotary import Rotary
from .config import ModelConfig
from .decoder import Decoder, DecoderLayer
from .spec import layer_attention
from .tensors import attention_parts, checkpoint_layout, mlp_parts
from .weights import ModuleTensors, WeightCollector


def build_decoder(
    config: ModelConfig,
    spec: ModelSpec,
    backend: Backend,
    weights: Iterable[tuple[str, Tensor]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """The model on the backend's device, in spec.dtype, for texts up to spec.max_context.

    `weights` yields a checkpoint's names and host tensors in any order; each is let go before the next is asked for.
    `progress` gets parameters done and in all. Raises ModelFormatError where tensors and config do not fit, and
    MemoryError.
    """
    layout = checkpoint_layout(config)
    collector = WeightCollector(layout, getattr(torch, spec.dtype))
    modules = _Modules(config, spec, backend)
    done, total = 0, layout.num_parameters
    for name, tensor in weights:
        complete = collector.take(name, tensor)
        done += tensor.numel()
        if complete is not None:
            modules.add(*complete)
        if progress is not None:
            progress(min(done, total), total)
    collector.check_complete()
    return modules.assemble()


class _Modules:
    """The parts of a decoder, each built as soon as all its tensors are there."""

    def __init__(self, config: ModelConfig, spec: ModelSpec, backend: Backend) -> None:
        self._config = config
        self._spec = spec
        self._backend = backend
        self._linears: dict[str, nn.Module] = {}
        self._norms: dict[str, Norm] = {}
        self._specs = _linear_specs(config, spec.dtype)

    def add(self, name: str, tensors: ModuleTensors) -> None:
        """Give a module's tensors to the backend."""
        if name == "embedding":
            self._add_embedding(tensors["weight"])
        elif name.endswith(".experts"):
            self._linears[name] = self._backend.linear.build_experts(
                self._specs[f"{name}.gate_up"],
                self._specs[f"{name}.down"],
                {kind: {"weight": weight} for kind, weight in tensors.items()},
                self._config.activation,
            )
        elif name in self._specs:
            self._linears[name] = build_linear(self._backend.linear, self._specs[name], tensors)
        else:
            self._norms[name] = self._norm(tensors)

    def assemble(self) -> Decoder:
        """Everything in its place."""
        config, backend, spec = self._config, self._backend, self._spec
        ropes = [config.layer_rope(layer) for layer in range(config.num_layers)]
        distinct = [rope for rope in dict.fromkeys(ropes) if rope is not None]
        attention = layer_attention(spec)
        layers = [
            self._layer(layer, attention[layer], None if rope is None else distinct.index(rope))
            for layer, rope in enumerate(ropes)
        ]
        multiplier = torch.tensor(config.embedding_multiplier, dtype=getattr(torch, spec.dtype))
        return Decoder(
            sampler=backend.sampler,
            embedding=Embedding(self._linears["embedding"], backend.comm, multiplier.item()),
            embedding_norm=self._norms.get("embedding_norm"),
            rotaries=[Rotary(rope, spec.max_context, backend.runtime) for rope in distinct],
            layers=layers,
            norm=self._norms["norm"],
            head=Head(
                self._linears["head"], backend.comm, config.vocab_size, config.logit_soft_cap
            ),
        )

    def _layer(self, layer: int, attention: AttentionSpec, rotary: int | None) -> DecoderLayer:
        here, norms = f"layers.{layer}.", self._norms
        return DecoderLayer(
            attention_norm=norms[f"{here}attention_norm"],
            attention=Attention(
                layer,
                attention,
                self._backend,
                qkv=self._linears[f"{here}attention.qkv"],
                o=RowParallel(self._linears[f"{here}attention.o"], self._backend.comm),
                q_norm=norms.get(f"{here}attention.q_norm"),
                k_norm=norms.get(f"{here}attention.k_norm"),
            ),
            attention_post_norm=norms.get(f"{here}attention_post_norm"),
            mlp_norm=norms[f"{here}mlp_norm"],
            mlp=self._mlp(f"{here}mlp."),
            mlp_post_norm=norms.get(f"{here}mlp_post_norm"),
            rotary=rotary,
        )

    def _mlp(self, here: str) -> MLP | MoE:
        config, backend = self._config, self._backend
        if config.num_experts:
            return MoE(
                self._linears[f"{here}router"],
                self._linears[f"{here}experts"],
                backend.ops,
                backend.comm,
                experts_per_token=config.experts_per_token,
                normalise=config.normalise_experts,
            )
        return MLP(
            self._linears[f"{here}gate_up"],
            RowParallel(self._linears[f"{here}down"], backend.comm),
            backend.ops,
            config.activation,
            gated=config.gated,
        )

    def _add_embedding(self, weight: Tensor) -> None:
        config = self._config
        table = EmbeddingSpec(
            first_row=0,
            num_rows=config.vocab_size,
            hidden_size=config.hidden_size,
            dtype=self._spec.dtype,
            shard="out",
        )
        tied_head = self._specs["head"] if config.tied_embeddings else None
        embedding, head = self._backend.linear.build_embedding(table, weight, tied_head)
        self._linears["embedding"] = embedding
        if head is not None:
            self._linears["head"] = head

    def _norm(self, tensors: ModuleTensors) -> Norm:
        config, ops = self._config, self._backend.ops
        held = {kind: self._backend.runtime.put(tensor) for kind, tensor in tensors.items()}
        if config.norm == "layer":
            return LayerNorm(ops, held["weight"], held["bias"], config.norm_eps)
        return RMSNorm(
            ops,
            held["weight"],
            config.norm_eps,
            offset=config.norm_offset,
            weight_in_float=config.norm_weight_in_float,
        )


def _linear_specs(config: ModelConfig, dtype: str) -> Mapping[str, LinearSpec]:
    """Of every linear layer, by name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    attention_out = config.num_heads * config.head_size
    experts = config.num_experts
    specs = [
        column_parallel(
            "head", hidden, (config.vocab_size,), bias=False, dtype=dtype, out_dtype="float32"
        )
    ]
    for layer in range(config.num_layers):
        attention, mlp = f"layers.{layer}.attention.", f"layers.{layer}.mlp."
        bias = config.qkv_bias
        specs += [
            column_parallel(
                f"{attention}qkv", hidden, attention_parts(config), bias=bias, dtype=dtype
            ),
            row_parallel(f"{attention}o", attention_out, hidden, bias=config.o_bias, dtype=dtype),
        ]
        if experts:
            specs.append(replicated(f"{mlp}router", hidden, experts, dtype=dtype))
            mlp = f"{mlp}experts."
        bias = config.mlp_bias
        specs += [
            column_parallel(
                f"{mlp}gate_up",
                hidden,
                mlp_parts(config),
                bias=bias,
                dtype=dtype,
                num_experts=experts,
            ),
            row_parallel(f"{mlp}down", inner, hidden, bias=bias, dtype=dtype, num_experts=experts),
        ]
    return {spec.name: spec for spec in specs}
