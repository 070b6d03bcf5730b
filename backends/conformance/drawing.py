"""What a row of logits should give: the definitions of ..sampler and ..step in float64, on the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..kv_cache import IN_PROMPT
from ..step import F32, I32

F64: TypeAlias = NDArray[np.float64]
WORD = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """How one row of logits is drawn from; the defaults are greedy and change nothing."""

    row: int = 0
    """Which row of the table of logits."""
    slot: int | None = None
    """Request slot; None is the row's place in its step."""
    position: int = 0
    temperature: float = 0.0
    seed: int = 0
    """64 bits, unsigned."""
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0)
    bias: Mapping[int, float] = field(default_factory=dict)
    allowed: frozenset[int] | None = None
    """Ids that the bitmask lets through."""
    target: int | None = None
    of_drawn: bool = False
    for_sink: bool = False
    """What is drawn is kept for nobody, as on padding."""

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = Drawing()
        told = [f"{name} {it}" for name, it in given.items() if it != getattr(plain, name)]
        return ", ".join(told) or "greedy"

    @property
    def features(self) -> frozenset[str]:
        """What the variant must have at least; logprobs are asked for apart."""
        filters = (self.top_k, self.top_p, self.min_p, self.typical_p)
        needs = {
            "sampled": self.temperature > 0,
            "filters": filters != (None, 1.0, 0.0, 1.0),
            "penalties": self.penalties != (1.0, 0.0, 0.0),
            "bias": bool(self.bias),
            "bitmask": self.allowed is not None,
            "targets": self.target is not None,
            "logprobs": self.of_drawn,
        }
        return frozenset(name for name, needed in needs.items() if needed)


def sampling_arrays(
    drawings: Sequence[Drawing],
    features: frozenset[str],
    *,
    num_slots: int,
    vocab_size: int,
    max_logit_bias: int,
) -> dict[str, I32 | F32]:
    """The arrays of a SamplingBatch for `drawings`, by name: those that `features` call for."""
    integers: dict[str, tuple[str, list[object]]] = {
        "seed": ("sampled", [seed_words(d.seed) for d in drawings]),
        "top_k": ("filters", [vocab_size if d.top_k is None else d.top_k for d in drawings]),
        "bias_ids": ("bias", [_padded(list(d.bias), -1, max_logit_bias) for d in drawings]),
        "bitmask": ("bitmask", [_bitmask(d.allowed, vocab_size) for d in drawings]),
        "target": ("targets", [-1 if d.target is None else d.target for d in drawings]),
        "of_drawn": ("logprobs", [int(d.of_drawn) for d in drawings]),
    }
    floats: dict[str, tuple[str, list[object]]] = {
        "temperature": ("sampled", [d.temperature for d in drawings]),
        "top_p": ("filters", [d.top_p for d in drawings]),
        "min_p": ("filters", [d.min_p for d in drawings]),
        "typical_p": ("filters", [d.typical_p for d in drawings]),
        "penalties": ("penalties", [d.penalties for d in drawings]),
        "bias_values": ("bias", [_padded(d.bias.values(), 0, max_logit_bias) for d in drawings]),
    }
    slots = [index if d.slot is None else d.slot for index, d in enumerate(drawings)]
    sunk = [drawing.for_sink or drawing.target is not None for drawing in drawings]
    kept = [num_slots if is_sunk else slot for slot, is_sunk in zip(slots, sunk, strict=True)]
    arrays: dict[str, I32 | F32] = {
        "slot": np.array(kept, np.int32),
        "position": np.array([d.position for d in drawings], np.int32),
    }
    for name, (feature, numbers) in integers.items():
        if feature in features:
            arrays[name] = np.array(numbers, np.int64).astype(np.int32)
    for name, (feature, numbers) in floats.items():
        if feature in features:
            arrays[name] = np.array(numbers, np.float32)
    return arrays


def seed_words(seed: int) -> tuple[int, int]:
    """Low and high word of 64 bits, as int32."""
    low, high = np.array([seed & WORD, seed >> 32], np.uint32).view(np.int32).tolist()
    return low, high


def drawn_from(logits: F32, drawing: Drawing, counts: I32 | None = None) -> F64:
    """The logits [V] that the row is drawn from, -inf where nothing can be drawn. counts [V] as KVCache.reset_slot."""
    found = logits.astype(np.float64)
    if counts is not None:
        found = penalised(found, counts, drawing.penalties)
    for token, value in drawing.bias.items():
        found[token] += np.float32(value)
    if drawing.allowed is not None:
        found[[token for token in range(found.size) if token not in drawing.allowed]] = -np.inf
    if drawing.temperature == 0:
        return found
    found /= np.float32(drawing.temperature)
    found[~_kept_by_top_k(found, drawing.top_k)] = -np.inf
    found[~_kept_by_top_p(found, drawing.top_p)] = -np.inf
    found[~_kept_by_typical_p(found, drawing.typical_p)] = -np.inf
    share = softmax(found)
    found[share < np.float32(drawing.min_p) * share.max()] = -np.inf
    return found


def penalised(logits: F64, counts: I32, penalties: tuple[float, float, float]) -> F64:
    """Repetition for prompt and output; frequency and presence for the output alone."""
    repetition, frequency, presence = (float(np.float32(penalty)) for penalty in penalties)
    repeated = np.where(logits > 0, logits / repetition, logits * repetition)
    found = np.where(counts > 0, repeated, logits)
    num_drawn = counts % IN_PROMPT
    lowered: F64 = found - frequency * num_drawn - presence * (num_drawn > 0)
    return lowered


def scores(logits: F32, drawing: Drawing, counts: I32 | None = None) -> F64:
    """What the drawn id is the argmax of: [V]."""
    found = drawn_from(logits, drawing, counts)
    if drawing.temperature == 0:
        return found
    return found + noise(drawing.seed, drawing.position, found.size)


def noise(seed: int, position: int, vocab_size: int) -> F64:
    """[V] as ..sampler defines it."""
    low, high = seed & WORD, seed >> 32
    key = mix(mix(mix(low) ^ high) ^ position)
    bits = [mix(key ^ mix(token + 1)) & 0x7FFFFF for token in range(vocab_size)]
    uniform = (np.array(bits, np.float64) + 0.5) / 2**23
    found: F64 = -np.log(-np.log(uniform))
    return found


def mix(word: int) -> int:
    """Murmur3's 32-bit finaliser, on plain integers."""
    word = ((word ^ word >> 16) * 0x85EBCA6B) & WORD
    word = ((word ^ word >> 13) * 0xC2B2AE35) & WORD
    return word ^ word >> 16


def softmax(logits: F64) -> F64:
    """Shares of [V]."""
    powers = np.exp(logits - logits.max())
    shares: F64 = powers / powers.sum()
    return shares


def log_softmax(logits: F64) -> F64:
    """Logarithms of the shares of [V]."""
    shifted = logits - logits.max()
    found: F64 = shifted - np.log(np.exp(shifted).sum())
    return found


def chi_square(observed: NDArray[np.int64], share: F64) -> tuple[float, float]:
    """Pearson's statistic, and the value that one correct sampler in 100,000 exceeds (Wilson and Hilferty's cube root).

    Ids expected fewer than five times are taken together, as the test's approximation wants.
    """
    expected = share * observed.sum()
    pairs: list[tuple[float, float]] = []
    seen = due = 0.0
    for token in np.argsort(expected, kind="stable"):
        seen, due = seen + observed[token], due + expected[token]
        if due >= 5:
            pairs.append((seen, due))
            seen = due = 0.0
    statistic = sum((seen - due) ** 2 / due for seen, due in pairs)
    freedom = max(1, len(pairs) - 1)
    spread = 2 / (9 * freedom)
    return statistic, freedom * (1 - spread + 4.265 * spread**0.5) ** 3


def _kept_by_top_k(logits: F64, top_k: int | None) -> NDArray[np.bool_]:
    kept = np.ones(logits.size, bool)
    if top_k is not None:
        kept[np.argsort(-logits, kind="stable")[top_k:]] = False
    return kept


def _kept_by_top_p(logits: F64, top_p: float) -> NDArray[np.bool_]:
    """The best until their probability reaches p, the one that crosses it too."""
    return _kept_until(np.argsort(-logits, kind="stable"), logits, top_p)


def _kept_by_typical_p(logits: F64, typical_p: float) -> NDArray[np.bool_]:
    """Nearest to the mean surprise until their probability reaches p (Meister et al. 2022, arXiv:2202.00666)."""
    share = softmax(logits)
    surprise = -np.log(share, where=share > 0, out=np.full(share.size, -np.inf))
    mean = (share[share > 0] * surprise[share > 0]).sum()
    return _kept_until(np.argsort(np.abs(surprise - mean), kind="stable"), logits, typical_p)


def _kept_until(order: NDArray[np.intp], logits: F64, p: float) -> NDArray[np.bool_]:
    kept = np.ones(logits.size, bool)
    if p < 1:
        reached = np.cumsum(softmax(logits)[order]) >= np.float32(p)
        kept[order[int(np.argmax(reached)) + 1 :]] = False
    return kept


def _padded(numbers: Iterable[float], pad: int, size: int) -> list[float]:
    found = list(numbers)
    return found + [pad] * (size - len(found))


def _bitmask(allowed: frozenset[int] | None, vocab_size: int) -> list[int]:
    """[ceil(V / 32)] words as int32; the bits past the vocabulary are set, as those of neutral rows are."""
    words = [WORD] * -(-vocab_size // 32)
    if allowed is not None:
        for token in range(vocab_size):
            if token not in allowed:
                words[token // 32] &= ~(1 << token % 32)
    signed: list[int] = np.array(words, np.uint32).view(np.int32).tolist()
    return signed
