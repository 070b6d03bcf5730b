"""From a checkpoint to a Decoder, module by module: memory holds what is built and one module's tensors beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backends.backend import Backend
from ...backends.options import AttentionSpec, ModelSpec
from ...backends.quantization import EmbeddingSpec, LinearSpec
from ..layers.attention import Attention, alibi_slopes
from ..layers.embedding import Embedding, Head
from ..layers.linear import RowParallel, build_linear
from ..layers.mlp import MLP
from ..layers.moe import MoE
from ..layers.norm import LayerNorm, Norm, RMSNorm
from ..layers.rotary import Rotary
from ..loading.weight_source import WeightSource
from .checkpoint import Checkpoint
from .config import ModelConfig
from .decoder import Decoder, DecoderLayer
from .report import WeightReport, held_bytes
from .shard import WHOLE, Shard
from .spec import layer_attention
from .tensors import Module, checkpoint_layout
from .weights import ModuleTensors, plain_tensors


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A model on its device."""

    model: Decoder
    report: WeightReport


def build_decoder(
    config: ModelConfig,
    spec: ModelSpec,
    backend: Backend,
    source: WeightSource,
    *,
    shard: Shard = WHOLE,
    progress: Callable[[int, int], None] | None = None,
) -> BuiltModel:
    """The part of a model that a rank holds, on the backend's device, in spec.dtype, for texts up to spec.max_context.

    `spec` is model_spec's of the same `shard`. `progress` gets bytes of the source's weights, done and in all. Raises
    ModelFormatError where source and config do not fit, before any weight is read, and MemoryError.
    """
    layout = checkpoint_layout(config, shard)
    checkpoint = Checkpoint(source, layout)
    sizes = {name: checkpoint.num_bytes(module) for name, module in layout.modules.items()}
    modules = _Modules(config, spec, backend, checkpoint, shard)
    done = 0
    for name, module in layout.modules.items():
        modules.add(module)
        done += sizes[name]
        if progress is not None:
            progress(done, sum(sizes.values()))
    model = modules.assemble()
    return BuiltModel(model=model, report=WeightReport(held_bytes=held_bytes(model)))


class _Modules:
    """The parts of a decoder."""

    def __init__(
        self,
        config: ModelConfig,
        spec: ModelSpec,
        backend: Backend,
        checkpoint: Checkpoint,
        shard: Shard,
    ) -> None:
        self._config = config
        self._spec = spec
        self._backend = backend
        self._checkpoint = checkpoint
        self._shard = shard
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._built: dict[str, nn.Module] = {}
        self._norms: dict[str, Norm] = {}
        self._gate_up: tuple[LinearSpec, ModuleTensors] | None = None

    def add(self, module: Module) -> None:
        """Read a module's tensors and give them to the backend."""
        tensors = plain_tensors(self._checkpoint, module, self._dtype, module.kinds)
        if module.columns is None:
            self._norms[module.name] = self._norm(tensors)
        elif module.name == "embedding":
            self._add_embedding(module, tensors["weight"])
        elif module.name.endswith(".experts.gate_up"):
            self._gate_up = self._linear_spec(module), tensors
        elif module.name.endswith(".experts.down"):
            self._add_experts(module, tensors)
        else:
            spec = self._linear_spec(module)
            self._built[module.name] = build_linear(self._backend.linear, spec, tensors)

    def _linear_spec(self, module: Module) -> LinearSpec:
        assert module.columns is not None
        dtype = self._spec.dtype
        return LinearSpec(
            name=module.name,
            in_features=module.columns.size,
            out_features=sum(module.parts),
            parts=module.parts,
            bias="bias" in module.kinds,
            dtype=dtype,
            out_dtype="float32" if module.name == "head" else dtype,
            shard=module.cut,
            num_experts=module.num_experts,
        )

    def _add_experts(self, module: Module, down: ModuleTensors) -> None:
        assert self._gate_up is not None  # comes before
        spec, gate_up = self._gate_up
        self._gate_up = None
        self._built[module.name.removesuffix(".down")] = self._backend.linear.build_experts(
            spec,
            self._linear_spec(module),
            {"gate_up": gate_up, "down": down},
            self._config.activation,
        )

    def _add_embedding(self, module: Module, weight: Tensor) -> None:
        rows = module.takes[0][0].rows
        table = EmbeddingSpec(
            first_row=rows.size * self._shard.rank,
            num_rows=rows.size,
            hidden_size=self._config.hidden_size,
            dtype=self._spec.dtype,
            shard="out",
        )
        tied = replace(module, name="head") if self._config.tied_embeddings else None
        embedding, head = self._backend.linear.build_embedding(
            table, weight, None if tied is None else self._linear_spec(tied)
        )
        self._built["embedding"] = embedding
        if head is not None:
            self._built["head"] = head

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
            embedding=Embedding(self._built["embedding"], backend.comm, multiplier.item()),
            embedding_norm=self._norms.get("embedding_norm"),
            rotaries=[Rotary(rope, spec.max_context, backend.runtime) for rope in distinct],
            layers=layers,
            norm=self._norms["norm"],
            head=Head(self._built["head"], backend.comm, config.vocab_size, config.logit_soft_cap),
        )

    def _layer(self, layer: int, attention: AttentionSpec, rotary: int | None) -> DecoderLayer:
        here, norms = f"layers.{layer}.", self._norms
        return DecoderLayer(
            attention_norm=norms[f"{here}attention_norm"],
            attention=Attention(
                layer,
                attention,
                self._backend,
                qkv=self._built[f"{here}attention.qkv"],
                o=RowParallel(self._built[f"{here}attention.o"], self._backend.comm),
                q_norm=norms.get(f"{here}attention.q_norm"),
                k_norm=norms.get(f"{here}attention.k_norm"),
                alibi_slopes=self._slopes() if attention.alibi else None,
            ),
            attention_post_norm=norms.get(f"{here}attention_post_norm"),
            mlp_norm=norms[f"{here}mlp_norm"],
            mlp=self._mlp(f"{here}mlp."),
            mlp_post_norm=norms.get(f"{here}mlp_post_norm"),
            rotary=rotary,
        )

    def _slopes(self) -> Tensor:
        """ALiBi's, of this rank's heads."""
        heads = self._shard.heads(self._config.num_heads, self._config.num_kv_heads)
        slopes = alibi_slopes(self._config.num_heads)[heads.start : heads.stop]
        return self._backend.runtime.put(F.pad(slopes, (0, heads.size - heads.num_held)))

    def _mlp(self, here: str) -> MLP | MoE:
        config, backend = self._config, self._backend
        if config.num_experts:
            return MoE(
                self._built[f"{here}router"],
                self._built[f"{here}experts"],
                backend.ops,
                backend.comm,
                experts_per_token=config.experts_per_token,
                normalise=config.normalise_experts,
            )
        return MLP(
            self._built[f"{here}gate_up"],
            RowParallel(self._built[f"{here}down"], backend.comm),
            backend.ops,
            config.activation,
            gated=config.gated,
        )

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
