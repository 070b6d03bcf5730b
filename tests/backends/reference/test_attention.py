"""Both implementations against a dense float64 oracle, over a cache in which whatever is not written is nan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from chipset.backends.attention import AttentionParams
from chipset.backends.conformance.held import held, off_ties
from chipset.backends.options import AttentionSpec
from chipset.backends.reference.attention import ReferenceAttention, attention_arrays
from chipset.backends.reference.kv_cache import PagedCache
from chipset.backends.reference.staging import stage, unpack
from chipset.backends.shapes import Bucket, Phase
from chipset.backends.step import SamplingBatch, StepBatch
from chipset.plugins.cpu.attention import CPUAttention
from chipset.plugins.cpu.rows import AttentionInputs

PLAIN = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=8, value_size=8, scale=0.4, group=0)


def i32(values: object) -> np.ndarray:
    return np.ascontiguousarray(np.array(values, dtype=np.int32))


def garbage(shape: tuple[int, ...], spec: AttentionSpec, dtype: torch.dtype) -> PagedCache:
    """Of one layer; shape [blocks, B, Hkv]."""
    is_scaled = dtype == torch.int8
    filler = 99 if is_scaled else torch.nan
    scales = [{0: torch.full(shape, torch.nan)} if is_scaled else {} for _ in range(2)]
    return PagedCache(
        keys={0: torch.full((*shape, spec.head_size), filler, dtype=dtype)},
        values={0: torch.full((*shape, spec.value_size), filler, dtype=dtype)},
        key_scales=scales[0],
        value_scales=scales[1],
        last_ids=torch.zeros(1),
        counts=torch.zeros(1, 0),
    )


class Reference:
    def __init__(self, in_place: bool = True) -> None:
        self.attention = ReferenceAttention(in_place=in_place)

    def inputs(self, batch: StepBatch, block_size: int) -> object:
        arrays = attention_arrays(batch, block_size)
        return unpack(stage(batch, arrays, lambda tensor: tensor)).attention


class Functional(Reference):
    def __init__(self) -> None:
        super().__init__(in_place=False)


class CPU:
    def __init__(self) -> None:
        self.attention = CPUAttention()

    def inputs(self, batch: StepBatch, block_size: int) -> object:
        return AttentionInputs(batch, block_size)


@pytest.fixture(params=[Reference, Functional, CPU])
def served(request: pytest.FixtureRequest) -> Reference | CPU:
    return request.param()


class Texts:
    """Rows of random q, k and v that are fed to an implementation a few tokens at a time."""

    def __init__(
        self,
        served: Reference | CPU,
        spec: AttentionSpec,
        lengths: list[int],
        *,
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.served, self.spec, self.block_size = served, spec, block_size
        self.generator = torch.Generator().manual_seed(seed)
        self.q = [self.random(n, spec.num_heads, spec.head_size).to(dtype) for n in lengths]
        self.k = [self.random(n, spec.num_kv_heads, spec.head_size).to(dtype) for n in lengths]
        self.v = [self.random(n, spec.num_kv_heads, spec.value_size).to(dtype) for n in lengths]
        self.given = self.k, self.v
        self.params = AttentionParams(
            sinks=self.random(spec.num_heads) if spec.sinks else None,
            alibi_slopes=self.random(spec.num_heads).abs() if spec.alibi else None,
        )
        self.computed = [0] * len(lengths)
        self.width = -(-max(lengths) // block_size)
        blocks = torch.randperm(len(lengths) * self.width, generator=self.generator) + 1
        self.table = i32(blocks.reshape(len(lengths), self.width).numpy())
        shape = (len(lengths) * self.width + 1, block_size, spec.num_kv_heads)
        self.cache = garbage(shape, spec, kv_dtype or dtype)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def step(
        self, tokens: dict[int, int], *, pad_tokens: int = 0, pad_rows: int = 0
    ) -> list[Tensor]:
        """Feed `tokens` = {row: how many}, in this order; the outputs of each row."""
        batch = self.batch(tokens, pad_tokens, pad_rows)
        took = [slice(self.computed[r], self.computed[r] + n) for r, n in tokens.items()]
        q, k, v = (
            torch.cat([x[r][at] for r, at in zip(tokens, took, strict=True)])
            for x in (self.q, *self.given)
        )
        q, k, v = (torch.cat((x, x.new_full((pad_tokens, *x.shape[1:]), 3.0))) for x in (q, k, v))
        out, self.cache = self.served.attention.attend(
            0,
            self.spec,
            q,
            k,
            v,
            self.cache,
            self.served.inputs(batch, self.block_size),
            self.params,
        )
        assert torch.isfinite(out).all()
        for row, n in tokens.items():
            self.computed[row] += n
        return list(out[: len(out) - pad_tokens].split(list(tokens.values())))

    def batch(self, tokens: dict[int, int], pad_tokens: int, pad_rows: int) -> StepBatch:
        rows, total = list(tokens), sum(tokens.values())
        context = [self.computed[r] + n for r, n in tokens.items()]
        table = self.table[rows].copy()
        if self.spec.window is not None:
            for i, row in enumerate(rows):
                gone = max(0, self.computed[row] - self.spec.window + 1) // self.block_size
                table[i, :gone] = 0
        bucket = Bucket(
            phase=Phase.MIXED,
            num_rows=len(rows) + pad_rows,
            num_tokens=total + pad_tokens,
            num_logits=1,
            max_query=max(tokens.values()),
            blocks_per_row=self.width,
        )
        none = i32([0] * (total + pad_tokens))
        return StepBatch(
            bucket=bucket,
            num_rows=len(rows),
            num_decode_rows=0,
            num_tokens=total,
            num_logits=1,
            token_ids=none,
            positions=none[None],
            query_len=i32([*tokens.values(), *[0] * pad_rows]),
            context_len=i32([*context, *[0] * pad_rows]),
            row_slot=i32([0] * (len(rows) + pad_rows)),
            block_table=[np.concatenate((table, np.zeros((pad_rows, self.width), np.int32)))],
            logit_index=i32([0]),
            sampling=SamplingBatch(features=frozenset(), slot=i32([0]), position=i32([0])),
        )

    def expected(self, row: int) -> Tensor:
        """All outputs of a row, one query, head and key at a time in float64."""
        spec, q, k, v = self.spec, *(x[row].double() for x in (self.q, self.k, self.v))
        out = torch.zeros(len(q), spec.num_heads, spec.value_size, dtype=torch.float64)
        for head in range(spec.num_heads):
            shared = head // (spec.num_heads // spec.num_kv_heads)
            for at in range(len(q)):
                first = 0 if spec.window is None else max(0, at - spec.window + 1)
                scores = k[first : at + 1, shared] @ q[at, head] * spec.scale
                if spec.soft_cap is not None:
                    scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
                if self.params.alibi_slopes is not None:
                    distance = torch.arange(first, at + 1) - at
                    scores = scores + self.params.alibi_slopes[head].double() * distance
                weights = scores.exp()
                total = weights.sum()
                if self.params.sinks is not None:
                    total = total + self.params.sinks[head].double().exp()
                out[at, head] = (weights / total) @ v[first : at + 1, shared]
        return out

    def check(self, tokens: dict[int, int], tolerance: float = 2e-5, **padding: int) -> None:
        began = {row: self.computed[row] for row in tokens}
        for row, out in zip(tokens, self.step(tokens, **padding), strict=True):
            want = self.expected(row)[began[row] : self.computed[row]]
            torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)


VARIANTS = {
    "plain": PLAIN,
    "multi-head": replace(PLAIN, num_kv_heads=4),
    "multi-query": replace(PLAIN, num_kv_heads=1),
    "odd groups, other head size": replace(
        PLAIN, num_heads=9, num_kv_heads=3, head_size=16, value_size=16
    ),
    "values of another size": replace(PLAIN, value_size=12),
    "window": replace(PLAIN, window=5),
    "window of one": replace(PLAIN, window=1),
    "window of a block": replace(PLAIN, window=4),
    "soft cap": replace(PLAIN, soft_cap=0.7),
    "sinks": replace(PLAIN, sinks=True),
    "alibi": replace(PLAIN, alibi=True),
    "all at once": replace(PLAIN, window=6, soft_cap=0.7, sinks=True, alibi=True),
}


@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS)
class TestEachVariant:
    def test_whole_prompts_then_decoding(
        self, served: Reference | CPU, spec: AttentionSpec
    ) -> None:
        texts = Texts(served, spec, [13, 7, 16])
        texts.check({0: 10, 1: 4, 2: 9})
        for _ in range(3):
            texts.check({0: 1, 1: 1, 2: 1})

    def test_prompts_in_uneven_chunks(self, served: Reference | CPU, spec: AttentionSpec) -> None:
        texts = Texts(served, spec, [20, 17])
        for first, second in ((3, 6), (4, 1), (1, 5), (12, 5)):
            texts.check({0: first, 1: second})

    def test_decoding_and_prompts_mixed(self, served: Reference | CPU, spec: AttentionSpec) -> None:
        texts = Texts(served, spec, [16, 12, 20, 9])
        texts.check({0: 11, 1: 3})
        texts.check({0: 1, 1: 1, 2: 7, 3: 9})
        texts.check({1: 1, 0: 1, 2: 13})


def test_rows_of_very_different_length_decode_together(served: Reference | CPU) -> None:
    texts = Texts(served, PLAIN, [70, 3, 9, 40, 2], block_size=8)
    texts.check({0: 69, 1: 2, 2: 8, 3: 39, 4: 1})
    texts.check({4: 1, 0: 1, 2: 1, 1: 1, 3: 1})


def test_padding_rows_and_tokens_are_finite_and_change_nothing(served: Reference | CPU) -> None:
    texts = Texts(served, replace(PLAIN, window=5), [12, 8])
    texts.check({0: 11, 1: 7}, pad_tokens=3, pad_rows=2)
    texts.check({0: 1, 1: 1}, pad_tokens=2, pad_rows=2)


def test_a_step_of_nothing_but_padding_is_finite(served: Reference | CPU) -> None:
    texts = Texts(served, PLAIN, [4])
    batch = texts.batch({0: 1}, 0, 0)
    batch = replace(batch, num_rows=0, num_tokens=0, query_len=i32([0]), context_len=i32([0]))
    q, k = torch.ones(1, 4, 8), torch.ones(1, 2, 8)
    inputs = served.inputs(batch, 4)
    out, _ = served.attention.attend(0, PLAIN, q, k, k, texts.cache, inputs, AttentionParams())
    assert torch.isfinite(out).all()


def test_rows_share_the_blocks_of_a_prefix(served: Reference | CPU) -> None:
    texts = Texts(served, PLAIN, [14, 15])
    for x in (texts.q, texts.k, texts.v):
        x[1][:8] = x[0][:8]
    texts.check({0: 12})
    texts.table[1, :2] = texts.table[0, :2]
    texts.computed[1] = 8
    texts.check({0: 1, 1: 6})
    texts.check({0: 1, 1: 1})


def test_a_functional_cache_leaves_the_old_one_as_it_was() -> None:
    texts = Texts(Functional(), PLAIN, [6])
    old = texts.cache
    texts.check({0: 6})
    assert old.keys[0].isnan().all()
    assert old.values[0].isnan().all()


@pytest.mark.parametrize("spec", [PLAIN, VARIANTS["all at once"]], ids=["plain", "all at once"])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_bfloat16_stays_near(
    served: Reference | CPU, spec: AttentionSpec, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    texts = Texts(served, spec, [13, 11], dtype=dtype, kv_dtype=kv_dtype)
    texts.check({0: 9, 1: 3}, tolerance=0.05)
    texts.check({0: 3, 1: 7}, tolerance=0.05)
    texts.check({0: 1, 1: 1}, tolerance=0.05)


@pytest.mark.parametrize("spec", [PLAIN, VARIANTS["all at once"]], ids=["plain", "all at once"])
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_a_cache_of_one_byte_is_attended_to_as_it_is_held(
    served: Reference | CPU, spec: AttentionSpec, kv_dtype: str
) -> None:
    texts = Texts(served, spec, [13, 11], kv_dtype=getattr(torch, kv_dtype))
    scales = {"k": 1.0, "v": 1.0}
    if kv_dtype != "int8":
        scales = {"k": 0.125, "v": 4.0}
        texts.params = replace(
            texts.params,
            key_scale=torch.tensor(scales["k"]),
            value_scale=torch.tensor(scales["v"]),
        )
    texts.k, texts.v = ([off_ties(x) for x in side] for side in (texts.k, texts.v))
    texts.given = texts.k, texts.v
    texts.k, texts.v = (
        [torch.from_numpy(held(x, kv_dtype, scale=scales[name], fp8_max=None).worth) for x in side]
        for name, side in zip("kv", texts.given, strict=True)
    )
    texts.check({0: 9, 1: 3})
    texts.check({0: 3, 1: 7})
    texts.check({0: 1, 1: 1})


def test_only_causal_attention_is_served(served: Reference | CPU) -> None:
    assert served.attention.supports(PLAIN) == ()
    assert served.attention.supports(replace(PLAIN, causal=False))


def test_the_oracle_notices_a_window_that_is_off_by_one(served: Reference | CPU) -> None:
    texts = Texts(served, replace(PLAIN, window=5), [12])
    found = texts.step({0: 11})[0]
    texts.spec = replace(PLAIN, window=6)
    assert not torch.allclose(found.double(), texts.expected(0)[:11], atol=1e-3)
