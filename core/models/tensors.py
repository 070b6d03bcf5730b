"""Which modules a rank of the decoder holds, and which parts of a checkpoint's tensors make them. No torch here.

A layer is what a checkpoint stores under one name; a module of the decoder is made of parts of one or more of them:

    q_proj [Hq D, H] ─┐
    k_proj [Hkv D, H] ─┼─▶ qkv [(Hq + 2 Hkv) D, H], of this rank's heads
    v_proj [Hkv D, H] ─┘
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal, TypeAlias

from .config import ModelConfig
from .families import FAMILIES
from .names import TensorNames
from .shard import WHOLE, Shard, Span, whole

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Where the weight of an expert's layer lies in checkpoints that hold those of all experts in one tensor."""

    tensor: str
    shape: Shape
    """[E, rows, columns]"""
    expert: int
    first_row: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A layer of the checkpoint, whole."""

    name: str
    """Without `.weight` and `.bias`, and without the prefix that checkpoints may leave out."""
    shape: Shape
    """[N, K] of its weight; [N] of a norm's."""
    kinds: tuple[str, ...] = ("weight",)
    """Its tensors: weight, bias."""
    stack: Stack | None = None
    stays_plain: bool = False
    """It is not packed while it loads: a few numbers that decide much, or a table whose rows are looked up."""

    def tensor_shape(self, kind: str) -> Shape:
        """Of one of `kinds`."""
        return self.shape if kind == "weight" else self.shape[:1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Take:
    """Rows of a layer that become one part of a module."""

    layer: Layer
    rows: Span
    """What is read, and how many rows it becomes."""
    picked: tuple[int, ...] | None = None
    """Of the rows read, those that are taken, in order; None: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A module of the decoder, as this rank holds it."""

    name: str
    takes: tuple[tuple[Take, ...], ...]
    """Parts side by side; of each expert where there are any."""
    columns: Span | None = None
    """Of every layer; None: a norm."""
    kinds: tuple[str, ...] = ("weight",)
    cut: Literal["none", "out", "in"] = "none"
    """Which axis ranks hold parts of."""
    num_experts: int = 0
    bias_is_here: bool = True
    """False: it is another rank's, and zero here."""

    @property
    def parts(self) -> Shape:
        """Rows of each."""
        return tuple(take.rows.size for take in self.takes[0])

    def shape(self, kind: str) -> Shape:
        """Of one of `kinds`."""
        rows = sum(self.parts)
        if kind == "bias" or self.columns is None:
            return (rows,)
        experts = (self.num_experts,) if self.num_experts else ()
        return (*experts, rows, self.columns.size)


@dataclass(kw_only=True, slots=True)
class CheckpointLayout:
    """Everything that a rank holds, and every name that any layout of its checkpoints may have."""

    names: TensorNames
    modules: dict[str, Module] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    """Weights that a checkpoint may hold though this model does not use them (the head of tied embeddings)."""
    kv_scales: dict[str, str] = field(default_factory=dict)
    """Scalars that checkpoints with a quantised cache hold: which tensor of the decoder each is."""

    @property
    def num_parameters(self) -> int:
        """Numbers that this rank holds."""
        return sum(prod(m.shape(kind)) for m in self.modules.values() for kind in m.kinds)

    @property
    def layers(self) -> Mapping[str, Layer]:
        """By name."""
        return {
            take.layer.name: take.layer
            for module in self.modules.values()
            for takes in module.takes
            for take in takes
        }

    @property
    def tensors(self) -> Mapping[str, Shape]:
        """Of a plain checkpoint."""
        return {
            f"{layer.name}.{kind}": layer.tensor_shape(kind)
            for layer in self.layers.values()
            for kind in layer.kinds
        }

    def canonical(self, name: str) -> str:
        """A checkpoint's name as layers have it."""
        name = name.removeprefix(self.names.prefix)
        for theirs, ours in self.names.renamed:
            name = name.replace(theirs, ours)
        return name

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor that no layer has may be left out; `name` is canonical."""
        return name in self.unused or any(part in f".{name}" for part in self.names.ignored)


def checkpoint_layout(config: ModelConfig, shard: Shard = WHOLE) -> CheckpointLayout:
    """Of every checkpoint of this model."""
    names = FAMILIES[config.architecture].names
    builder = _Builder(config, shard, CheckpointLayout(names=names))
    builder.vocabulary()
    for layer in range(config.num_layers):
        builder.attention(f"layers.{layer}.", f"{names.layer}{layer}.")
        builder.mlp(f"layers.{layer}.", f"{names.layer}{layer}.")
    return builder.layout


class _Builder:
    """Adds module by module; `here` begins the names of modules, `there` those of layers."""

    def __init__(self, config: ModelConfig, shard: Shard, layout: CheckpointLayout) -> None:
        self.layout = layout
        self._config = config
        self._shard = shard
        self._names = layout.names

    def vocabulary(self) -> None:
        """Embedding, head, and the norms beside them."""
        config, names = self._config, self._names
        rows = [(config.vocab_size, self._shard.even(config.vocab_size))]
        self._column_parallel("embedding", (names.embedding,), rows)
        if config.tied_embeddings:
            self.layout.unused = frozenset({f"{names.head}.weight"})
        else:
            self._column_parallel("head", (names.head,), rows)
        if config.embedding_norm:
            self._norm("embedding_norm", names.embedding_norm)
        self._norm("norm", names.final_norm)

    def attention(self, here: str, there: str) -> None:
        """One layer's."""
        config, names, size = self._config, self._names, self._config.head_size
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        heads = self._shard.heads(num_heads, num_kv_heads).times(size)
        kv_heads = self._shard.kv_heads(num_kv_heads).times(size)
        self._column_parallel(
            f"{here}attention.qkv",
            tuple(there + name for name in names.qkv),
            [(num_heads * size, heads), *[(num_kv_heads * size, kv_heads)] * 2],
            bias=config.qkv_bias,
            head_size=size if names.interleaved_qkv else None,
        )
        self._row_parallel(
            f"{here}attention.o", there + names.o, num_heads * size, heads, bias=config.o_bias
        )
        if config.qk_norm:
            self._norm(f"{here}attention.q_norm", there + names.q_norm, size)
            self._norm(f"{here}attention.k_norm", there + names.k_norm, size)
        self._norm(f"{here}attention_norm", there + names.attention_norm)
        if config.norm_placement == "sandwich":
            self._norm(f"{here}attention_post_norm", there + names.attention_post_norm)
        self._kv_scales(here, there)

    def mlp(self, here: str, there: str) -> None:
        """One layer's, or its experts."""
        config, names, bias = self._config, self._names, self._config.mlp_bias
        self._norm(f"{here}mlp_norm", there + names.mlp_norm)
        if config.norm_placement == "sandwich":
            self._norm(f"{here}mlp_post_norm", there + names.mlp_post_norm)
        if config.num_experts:
            self._experts(f"{here}mlp.", there)
            return
        size = config.intermediate_size
        inner = self._shard.even(size)
        sources = tuple(there + name for name in names.gate_up)
        parts = [(size, inner)] * (2 if config.gated else 1)
        self._column_parallel(f"{here}mlp.gate_up", sources, parts, bias=bias)
        self._row_parallel(f"{here}mlp.down", there + names.down, size, inner, bias=bias)

    def _column_parallel(
        self,
        name: str,
        sources: tuple[str, ...],
        parts: Sequence[tuple[int, Span]],
        *,
        bias: bool = False,
        head_size: int | None = None,
    ) -> None:
        """`parts`: rows of each in the checkpoint, and those of this rank. From one layer for each, or one of all,
        where they lie one below the other or, given a `head_size`, head by head.
        """
        hidden, kinds = self._config.hidden_size, _kinds(bias)
        rows = [num_rows for num_rows, _ in parts]
        if len(sources) == 1:
            layer = Layer(
                name=sources[0],
                shape=(sum(rows), hidden),
                kinds=kinds,
                stays_plain=name in ("embedding", "head"),
            )
            takes = _fused(layer, parts) if head_size is None else _by_head(layer, parts, head_size)
        else:
            takes = tuple(
                Take(layer=Layer(name=source, shape=(num_rows, hidden), kinds=kinds), rows=span)
                for source, (num_rows, span) in zip(sources, parts, strict=True)
            )
        self.layout.modules[name] = Module(
            name=name, takes=(takes,), columns=whole(hidden), kinds=kinds, cut="out"
        )

    def _row_parallel(
        self, name: str, source: str, in_features: int, columns: Span, *, bias: bool
    ) -> None:
        hidden, kinds = self._config.hidden_size, _kinds(bias)
        layer = Layer(name=source, shape=(hidden, in_features), kinds=kinds)
        self.layout.modules[name] = Module(
            name=name,
            takes=((Take(layer=layer, rows=whole(hidden)),),),
            columns=columns,
            kinds=kinds,
            cut="in",
            bias_is_here=self._shard.rank == 0,
        )

    def _norm(self, name: str, source: str, size: int | None = None) -> None:
        """`size` None is the model's width. Those of heads are RMS norms everywhere."""
        kinds = _kinds(size is None and self._config.norm == "layer")
        size = size or self._config.hidden_size
        layer = Layer(name=source, shape=(size,), kinds=kinds)
        take = Take(layer=layer, rows=whole(size))
        self.layout.modules[name] = Module(name=name, takes=((take,),), kinds=kinds)

    def _experts(self, here: str, there: str) -> None:
        config, names, base = self._config, self._names, there + self._names.experts
        hidden, num_experts = whole(config.hidden_size), config.num_experts
        inner = self._shard.even(config.intermediate_size)
        router = Layer(
            name=there + names.router, shape=(num_experts, config.hidden_size), stays_plain=True
        )
        self.layout.modules[f"{here}router"] = Module(
            name=f"{here}router",
            takes=((Take(layer=router, rows=whole(num_experts)),),),
            columns=hidden,
        )
        gate_up, down = [], []
        for expert in range(num_experts):
            gate, up = (
                self._expert(f"{base}.{expert}.{name}", f"{base}.gate_up_proj", expert, index)
                for index, name in enumerate(names.expert_gate_up)
            )
            gate_up.append((Take(layer=gate, rows=inner), Take(layer=up, rows=inner)))
            one = self._expert(f"{base}.{expert}.{names.expert_down}", f"{base}.down_proj", expert)
            down.append((Take(layer=one, rows=hidden),))
        name = f"{here}experts.gate_up"
        self.layout.modules[name] = Module(
            name=name, takes=tuple(gate_up), columns=hidden, cut="out", num_experts=num_experts
        )
        name = f"{here}experts.down"
        self.layout.modules[name] = Module(
            name=name, takes=tuple(down), columns=inner, cut="in", num_experts=num_experts
        )

    def _expert(self, name: str, stacked: str, expert: int, index: int | None = None) -> Layer:
        """Gate (index 0) or up (1), which are stacked as one, or down."""
        hidden, inner = self._config.hidden_size, self._config.intermediate_size
        shape = (hidden, inner) if index is None else (inner, hidden)
        num_parts = 1 if index is None else 2
        stack = Stack(
            tensor=stacked,
            shape=(self._config.num_experts, num_parts * shape[0], shape[1]),
            expert=expert,
            first_row=(index or 0) * shape[0],
        )
        return Layer(name=name, shape=shape, stack=stack)

    def _kv_scales(self, here: str, there: str) -> None:
        """Spelled in three ways: beside the projections, beneath the attention's own module, or of a projection."""
        first = self._names.qkv[0]
        attention = there + first.rpartition(".")[0]
        for letter, tensor in (("k", "key_scale"), ("v", "value_scale")):
            projection = there + (first.replace("q_proj", f"{letter}_proj"))
            for base in (attention, f"{attention}.attn", projection):
                self.layout.kv_scales[f"{base}.{letter}_scale"] = f"{here}attention.{tensor}"


def _kinds(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _fused(layer: Layer, parts: Sequence[tuple[int, Span]]) -> tuple[Take, ...]:
    """Parts that lie one below the other."""
    takes, first = [], 0
    for num_rows, span in parts:
        rows = Span(start=first + span.start, stop=first + span.stop, size=span.size)
        takes.append(Take(layer=layer, rows=rows))
        first += num_rows
    return tuple(takes)


def _by_head(layer: Layer, parts: Sequence[tuple[int, Span]], size: int) -> tuple[Take, ...]:
    """q, k and v of a layer whose rows are (head, q | k | v, dimension). Each take reads the rows of all three."""
    heads = parts[0][1]
    rows = Span(start=3 * heads.start, stop=3 * heads.stop, size=heads.size)
    return tuple(
        Take(
            layer=layer,
            rows=rows,
            picked=tuple(
                3 * head + part * size + dimension
                for head in range(0, heads.num_held, size)
                for dimension in range(size)
            ),
        )
        for part in range(3)
    )
