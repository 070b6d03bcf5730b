"""From a checkpoint to a Decoder, module by module: memory holds what is built and one module's tensors beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backends.backend import Backend
from ...backends.formats import Scheme
from ...backends.options import AttentionSpec, ModelSpec
from ..layers.attention import Attention, alibi_slopes
from ..layers.embedding import Embedding, Head
from ..layers.linear import RowParallel
from ..layers.mlp import MLP
from ..layers.moe import MoE
from ..layers.norm import LayerNorm, Norm, RMSNorm
from ..layers.rotary import Rotary
from ..loading.weight_source import WeightSource
from ..quantization.ggml import GgmlScheme
from .checkpoint import Checkpoint
from .config import ModelConfig
from .decoder import Decoder, DecoderLayer
from .linears import LinearBuilder
from .report import WeightReport, held_bytes
from .shard import WHOLE, Shard
from .spec import layer_attention
from .tensors import Module, checkpoint_layout
from .weights import plain_tensors


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
    scheme: Scheme | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BuiltModel:
    """The part of a model that a rank holds, on the backend's device, in spec.dtype, for texts up to spec.max_context.

    `spec` is model_spec's of the same `shard`. `scheme` says how layers are packed, or are to be; None: they are plain,
    or as the blocks of a GGUF file. What no kernel of the backend takes is dequantised. `progress` gets bytes of the
    source's weights, done and in all. Raises ModelFormatError where source and config do not fit, before any weight is
    read, and MemoryError.
    """
    layout = checkpoint_layout(config, shard)
    if scheme is None and source.ggml_kinds:
        scheme = GgmlScheme(source.ggml_kinds)
    checkpoint = Checkpoint(source, layout, scheme)
    sizes = {name: checkpoint.num_bytes(module) for name, module in layout.modules.items()}
    modules = _Modules(config, spec, backend, checkpoint, shard, scheme)
    done = 0
    for name, module in layout.modules.items():
        try:
            modules.add(module)
        except RuntimeError as error:  # what torch raises where Python has MemoryError
            if backend.runtime.classify(error) == "out_of_memory":
                raise MemoryError(f"no memory for {name}: {error}") from error
            raise
        done += sizes[name]
        if progress is not None:
            progress(done, sum(sizes.values()))
    model = modules.assemble()
    return BuiltModel(model=model, report=modules.report(model))


class _Modules:
    """The parts of a decoder."""

    def __init__(
        self,
        config: ModelConfig,
        spec: ModelSpec,
        backend: Backend,
        checkpoint: Checkpoint,
        shard: Shard,
        scheme: Scheme | None,
    ) -> None:
        self.linears = LinearBuilder(backend.linear, checkpoint, scheme, spec.dtype)
        self._config = config
        self._spec = spec
        self._backend = backend
        self._checkpoint = checkpoint
        self._shard = shard
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._built: dict[str, nn.Module] = {}
        self._norms: dict[str, Norm] = {}
        self._gate_up: Module | None = None
        self._kv_scales = checkpoint.kv_scales()

    def add(self, module: Module) -> None:
        """Read a module's tensors and give them to the backend."""
        config, name = self._config, module.name
        if module.columns is None:
            self._norms[name] = self._norm(module)
        elif name == "embedding":
            first_row = self._shard.rank * module.parts[0]
            embedding, head = self.linears.build_embedding(
                module, first_row, is_tied=config.tied_embeddings
            )
            self._built[name] = embedding
            if head is not None:
                self._built["head"] = head
        elif name.endswith(".experts.gate_up"):
            self._gate_up = module
        elif name.endswith(".experts.down"):
            assert self._gate_up is not None  # comes before
            experts = self.linears.build_experts(self._gate_up, module, config.activation)
            self._built[name.removesuffix(".down")] = experts
        else:
            self._built[name] = self.linears.build(module)

    def report(self, model: Decoder) -> WeightReport:
        """What became of the weights."""
        packed = self.linears.packed
        return WeightReport(
            held_bytes=held_bytes(model),
            kernels=dict(self.linears.kernels),
            dequantised={} if packed is None else dict(packed.dequantised),
            dequantised_bytes=0 if packed is None else packed.dequantised_bytes,
        )

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
                key_scale=self._kv_scale(f"{here}attention.key_scale", attention),
                value_scale=self._kv_scale(f"{here}attention.value_scale", attention),
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

    def _kv_scale(self, name: str, attention: AttentionSpec) -> Tensor | None:
        """Of a float8 cache; other caches have no use for it."""
        is_float8 = self._spec.groups[attention.group].dtype.startswith("float8")
        if not is_float8 or name not in self._kv_scales:
            return None
        return self._backend.runtime.put(torch.tensor(self._kv_scales[name]))

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

    def _norm(self, module: Module) -> Norm:
        config, ops = self._config, self._backend.ops
        tensors = plain_tensors(self._checkpoint, module, self._dtype, module.kinds)
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
