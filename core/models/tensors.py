"""Which tensors the decoder holds, and where each tensor of a checkpoint goes. No torch here.

A target is a tensor of the decoder, such as layers.3.attention.qkv.weight; a piece is a checkpoint's tensor, or one of
the layouts it may come in, that fills a part of a target's rows:

    q_proj [Hq D, H] ─┐
    k_proj [Hkv D, H] ─┼─▶ qkv [(Hq + 2 Hkv) D, H]
    v_proj [Hkv D, H] ─┘
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import TypeAlias

from .config import ModelConfig
from .families import FAMILIES
from .names import TensorNames

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Where one tensor of a checkpoint goes."""

    target: str
    shape: Shape
    """It must have."""
    expert: int | None = None
    """Index on the target's first axis; None where that axis is the piece's own."""
    first_row: int = 0
    """On the axis after the expert's."""
    interleaved_heads: int = 0
    """> 0: rows are (head, q | k | v, dimension) and become (q | k | v, head, dimension)."""


@dataclass(kw_only=True, slots=True)
class CheckpointLayout:
    """All targets of a model, and every piece that any layout of its checkpoints may hold."""

    names: TensorNames
    targets: dict[str, Shape] = field(default_factory=dict)
    pieces: dict[str, Piece] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    """Weights that a checkpoint may hold though this model does not use them (the head of tied embeddings)."""

    @property
    def num_parameters(self) -> int:
        """Numbers that the model holds."""
        return sum(map(prod, self.targets.values()))

    def canonical(self, name: str) -> str:
        """A checkpoint's name as `pieces` has it."""
        name = name.removeprefix(self.names.prefix)
        for theirs, ours in self.names.renamed:
            name = name.replace(theirs, ours)
        return name

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor that is no piece may be left out; `name` is canonical."""
        return name in self.unused or any(part in f".{name}" for part in self.names.ignored)

    def add(self, target: str, sources: tuple[str, ...], parts: Shape, *rest: int) -> None:
        """A target of sum(parts) rows: from one source for each part, or from one that is fused."""
        self.targets[target] = (sum(parts), *rest)
        kind = target.rsplit(".", 1)[1]
        rows = parts if len(sources) == len(parts) else (sum(parts),)
        first = 0
        for source, num_rows in zip(sources, rows, strict=True):
            self.pieces[f"{source}.{kind}"] = Piece(
                target=target, shape=(num_rows, *rest), first_row=first
            )
            first += num_rows


def checkpoint_layout(config: ModelConfig) -> CheckpointLayout:
    """Of every checkpoint of this model."""
    names = FAMILIES[config.architecture].names
    layout = CheckpointLayout(names=names)
    hidden, vocab = config.hidden_size, config.vocab_size
    layout.add("embedding.weight", (names.embedding,), (vocab,), hidden)
    if config.tied_embeddings:
        layout.unused = frozenset({f"{names.head}.weight"})
    else:
        layout.add("head.weight", (names.head,), (vocab,), hidden)
    if config.embedding_norm:
        _add_norm(layout, config, "embedding_norm", names.embedding_norm)
    _add_norm(layout, config, "norm", names.final_norm)
    for layer in range(config.num_layers):
        _add_attention(layout, config, f"layers.{layer}.", f"{names.layer}{layer}.")
        _add_mlp(layout, config, f"layers.{layer}.", f"{names.layer}{layer}.")
    return layout


def _add_norm(layout: CheckpointLayout, config: ModelConfig, target: str, source: str) -> None:
    layout.add(f"{target}.weight", (source,), (config.hidden_size,))
    if config.norm == "layer":
        layout.add(f"{target}.bias", (source,), (config.hidden_size,))


def _add_attention(layout: CheckpointLayout, config: ModelConfig, here: str, there: str) -> None:
    names, size, hidden = layout.names, config.head_size, config.hidden_size
    parts = attention_parts(config)
    sources = tuple(there + name for name in names.qkv)
    layout.add(f"{here}attention.qkv.weight", sources, parts, hidden)
    if config.qkv_bias:
        layout.add(f"{here}attention.qkv.bias", sources, parts)
    if names.interleaved_qkv:
        _interleave(layout, sources[0], config.num_heads)
    o = (there + names.o,)
    layout.add(f"{here}attention.o.weight", o, (hidden,), config.num_heads * size)
    if config.o_bias:
        layout.add(f"{here}attention.o.bias", o, (hidden,))
    if config.qk_norm:
        layout.add(f"{here}attention.q_norm.weight", (there + names.q_norm,), (size,))
        layout.add(f"{here}attention.k_norm.weight", (there + names.k_norm,), (size,))
    _add_norm(layout, config, f"{here}attention_norm", there + names.attention_norm)
    if config.norm_placement == "sandwich":
        _add_norm(layout, config, f"{here}attention_post_norm", there + names.attention_post_norm)


def _interleave(layout: CheckpointLayout, source: str, num_heads: int) -> None:
    for name in (f"{source}.weight", f"{source}.bias"):
        if name in layout.pieces:
            layout.pieces[name] = replace(layout.pieces[name], interleaved_heads=num_heads)


def _add_mlp(layout: CheckpointLayout, config: ModelConfig, here: str, there: str) -> None:
    names, inner, hidden = layout.names, config.intermediate_size, config.hidden_size
    _add_norm(layout, config, f"{here}mlp_norm", there + names.mlp_norm)
    if config.norm_placement == "sandwich":
        _add_norm(layout, config, f"{here}mlp_post_norm", there + names.mlp_post_norm)
    if config.num_experts:
        _add_experts(layout, config, here, there)
        return
    parts = mlp_parts(config)
    sources, down = tuple(there + name for name in names.gate_up), (there + names.down,)
    layout.add(f"{here}mlp.gate_up.weight", sources, parts, hidden)
    layout.add(f"{here}mlp.down.weight", down, (hidden,), inner)
    if config.mlp_bias:
        layout.add(f"{here}mlp.gate_up.bias", sources, parts)
        layout.add(f"{here}mlp.down.bias", down, (hidden,))


def _add_experts(layout: CheckpointLayout, config: ModelConfig, here: str, there: str) -> None:
    names, inner, hidden = layout.names, config.intermediate_size, config.hidden_size
    layout.add(f"{here}mlp.router.weight", (there + names.router,), (config.num_experts,), hidden)
    gate_up, down = f"{here}mlp.experts.gate_up", f"{here}mlp.experts.down"
    packed = there + names.experts
    layout.targets[gate_up] = (config.num_experts, 2 * inner, hidden)
    layout.targets[down] = (config.num_experts, hidden, inner)
    layout.pieces[f"{packed}.gate_up_proj"] = Piece(target=gate_up, shape=layout.targets[gate_up])
    layout.pieces[f"{packed}.down_proj"] = Piece(target=down, shape=layout.targets[down])
    for expert in range(config.num_experts):
        one = f"{packed}.{expert}."
        for index, name in enumerate(names.expert_gate_up):
            layout.pieces[f"{one}{name}.weight"] = Piece(
                target=gate_up, shape=(inner, hidden), expert=expert, first_row=index * inner
            )
        layout.pieces[f"{one}{names.expert_down}.weight"] = Piece(
            target=down, shape=(hidden, inner), expert=expert
        )


def attention_parts(config: ModelConfig) -> Shape:
    """Rows of q, k and v."""
    kv = config.num_kv_heads * config.head_size
    return config.num_heads * config.head_size, kv, kv


def mlp_parts(config: ModelConfig) -> Shape:
    """Rows of gate and up, or of up alone."""
    return (config.intermediate_size,) * (2 if config.gated else 1)
