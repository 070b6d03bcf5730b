"""Small operations of a model, against float64: values, where they round, and that they leave their arguments alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from ..capabilities import Capabilities
from ..kv_cache import Cache
from ..ops import Ops
from ..options import EngineOptions
from ..plugin import Plugin
from ..reference.dtypes import torch_dtype
from ..step import F32, StepInputs
from .modules import Reader
from .session import Session
from .suite import Suite, session, small_model
from .tokens import read_text, read_tokens
from .tolerance import excess

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
NUM_TOKENS = 7
HIDDEN = 80
EPS = 1e-3
"""Large, so that leaving it out shows."""
MOST_ROUNDED_APART = 0.05
"""Share of values that may round the other way: those that lie within float32's error of the middle of two."""

Tensors = Mapping[str, Tensor]
Op = Callable[[Ops, Tensors], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpBench:
    """A session, and operations on rows of tensors, a row a token."""

    session: Session
    dtype: str
    is_quick: bool

    def random(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        """Normal numbers of the bench's dtype."""
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return numbers.to(torch_dtype(self.dtype))

    def run(self, op: Op, by_token: Tensors, whole: Tensors, *, dtype: str | None = None) -> Tensor:
        """float64 [NUM_TOKENS, n]: `op` on the tokens' rows of `by_token`; it must return `dtype` (the bench's)."""
        reader: Reader
        dtypes: set[torch.dtype] = set()

        def compute(ids: Tensor, inputs: StepInputs, cache: Cache) -> tuple[Tensor, Cache]:  # noqa: ARG001
            found = {name: reader.get_buffer(name).index_select(0, ids) for name in by_token}
            out = op(self.session.backend.ops, found | {n: reader.get_buffer(n) for n in whole})
            dtypes.add(out.dtype)
            return out.reshape(ids.shape[0], -1), cache

        reader = self.session.reader(compute, {**by_token, **whole})
        ids = range(NUM_TOKENS)
        values = read_tokens(self.session, reader, ids)
        if not self.is_quick:
            at_once: F32 = read_text(self.session, reader, ids)
            np.testing.assert_allclose(at_once, values[-len(at_once) :], rtol=1e-2, atol=1e-2)
        assert dtypes == {torch_dtype(dtype or self.dtype)}, f"returned {dtypes}"
        return torch.from_numpy(values).double()

    def close(self, found: Tensor, wanted: Tensor, dtype: str | None = None) -> None:
        """Within what the dtype allows."""
        error = excess(found.numpy(), wanted.reshape(found.shape).numpy(), dtype or self.dtype)
        assert error <= 1, f"{error:.1f} times the error that {dtype or self.dtype} allows"

    def rounded(self, found: Tensor, wanted: Tensor) -> None:
        """Close, and nearly all equal to `wanted`, which was rounded where the contract rounds."""
        wanted = wanted.reshape(found.shape).to(torch_dtype(self.dtype)).double()
        self.close(found, wanted)
        if self.dtype != "float32":
            apart = float((found != wanted).double().mean())
            assert apart <= MOST_ROUNDED_APART, f"{apart:.0%} of the values are rounded elsewhere"

    def keeps(self, op: Callable[[Ops, Tensors], object], by_token: Tensors) -> None:
        """`op` leaves each of its arguments as it was."""
        for name, tensor in by_token.items():

            def after(ops: Ops, found: Tensors, name: str = name) -> Tensor:
                op(ops, found)
                return found[name]

            found = self.run(after, by_token, {}, dtype=str(tensor.dtype).removeprefix("torch."))
            assert torch.equal(found, tensor.double().reshape(found.shape)), f"{name} was changed"


class OpsSuite(Suite):
    """The op table."""

    @pytest.fixture(params=DTYPES)
    def op_bench(
        self, request: pytest.FixtureRequest, plugin: Plugin, capabilities: Capabilities
    ) -> Iterator[OpBench]:
        """A session of each dtype that the backend claims."""
        dtype = str(request.param)
        self.require(dtype in capabilities.dtypes, f"dtype {dtype} not claimed")
        options = EngineOptions(dtype=dtype, max_batch_rows=8)
        with session(plugin, small_model(dtype=dtype), options) as opened:
            yield OpBench(session=opened, dtype=dtype, is_quick=self.is_quick)

    def test_rms_norm_rounds_before_the_weight(self, op_bench: OpBench) -> None:
        x, weight = rows_of_many_sizes(op_bench), op_bench.random(HIDDEN, seed=2)
        found = op_bench.run(
            lambda ops, given: ops.rms_norm(given["x"], given["weight"], EPS),
            {"x": x},
            {"weight": weight},
        )
        op_bench.rounded(found, normed(x).to(x.dtype).double() * weight.double())

    def test_rms_norm_with_an_offset_rounds_after_the_weight(self, op_bench: OpBench) -> None:
        x, weight = rows_of_many_sizes(op_bench), op_bench.random(HIDDEN, seed=2, scale=0.3)
        found = op_bench.run(
            lambda ops, given: ops.rms_norm(
                given["x"], given["weight"], EPS, offset=1.0, weight_in_float=True
            ),
            {"x": x},
            {"weight": weight},
        )
        op_bench.rounded(found, normed(x) * (1 + weight.double()))

    def test_rms_norm_of_heads_is_of_each_by_itself(self, op_bench: OpBench) -> None:
        x, weight = op_bench.random(NUM_TOKENS, 3, 64), op_bench.random(64, seed=2)
        found = op_bench.run(
            lambda ops, given: ops.rms_norm(given["x"], given["weight"], EPS),
            {"x": x},
            {"weight": weight},
        )
        op_bench.rounded(found, normed(x).to(x.dtype).double() * weight.double())

    @pytest.mark.parametrize("gemma", [False, True])
    def test_add_rms_norm_gives_the_norm_of_the_sum_and_the_sum(
        self, op_bench: OpBench, gemma: bool
    ) -> None:
        x, residual = rows_of_many_sizes(op_bench), op_bench.random(NUM_TOKENS, HIDDEN, seed=3)
        weight = op_bench.random(HIDDEN, seed=2)
        offset = 1.0 if gemma else 0.0

        def op(which: int) -> Op:
            return lambda ops, given: ops.add_rms_norm(
                given["x"],
                given["residual"],
                given["weight"],
                EPS,
                offset=offset,
                weight_in_float=gemma,
            )[which]

        by_token = {"x": x, "residual": residual}
        total = (x.double() + residual.double()).to(x.dtype)
        op_bench.rounded(op_bench.run(op(1), by_token, {"weight": weight}), total.double())
        found = op_bench.run(op(0), by_token, {"weight": weight})
        op_bench.close(found, normed(total) * (offset + weight.double()))

    def test_norms_leave_their_arguments_alone(self, op_bench: OpBench) -> None:
        x, residual = (
            op_bench.random(NUM_TOKENS, HIDDEN),
            op_bench.random(NUM_TOKENS, HIDDEN, seed=1),
        )

        def both(ops: Ops, given: Tensors) -> object:
            row, other = given["x"], given["residual"]
            weight = other.reshape(-1, HIDDEN)[0]
            ops.rms_norm(row, weight, EPS)
            ops.layer_norm(row, weight, weight, EPS)
            return ops.add_rms_norm(row, other, weight, EPS)

        op_bench.keeps(both, {"x": x, "residual": residual})

    @pytest.mark.parametrize("with_bias", [True, False])
    def test_layer_norm_has_mean_and_deviation_taken_off(
        self, op_bench: OpBench, with_bias: bool
    ) -> None:
        x, weight = rows_of_many_sizes(op_bench) + 2, op_bench.random(HIDDEN, seed=2)
        bias = op_bench.random(HIDDEN, seed=4) if with_bias else None
        found = op_bench.run(
            lambda ops, given: ops.layer_norm(given["x"], given["weight"], given.get("bias"), EPS),
            {"x": x},
            {"weight": weight} | ({} if bias is None else {"bias": bias}),
        )
        wide = x.double()
        wide = wide - wide.mean(-1, keepdim=True)
        wanted = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
        op_bench.close(found, wanted if bias is None else wanted + bias.double())

    @pytest.mark.parametrize("rotated", [64, 32])
    @pytest.mark.parametrize("interleaved", [False, True])
    def test_rope_turns_pairs_of_the_first_numbers_of_a_head(
        self, op_bench: OpBench, interleaved: bool, rotated: int
    ) -> None:
        q, k = op_bench.random(NUM_TOKENS, 3, 64), op_bench.random(NUM_TOKENS, 1, 64, seed=1)
        cos, sin = turns(rotated)

        def op(which: int) -> Op:
            return lambda ops, given: ops.rope(
                given["q"], given["k"], given["cos"], given["sin"], interleaved=interleaved
            )[which]

        by_token = {"q": q, "k": k, "cos": cos, "sin": sin}
        for which, x in enumerate((q, k)):
            found = op_bench.run(op(which), by_token, {})
            op_bench.rounded(found, turned(x.double(), cos.double(), sin.double(), interleaved))

    def test_rope_leaves_its_arguments_alone(self, op_bench: OpBench) -> None:
        cos, sin = turns(64)
        q, k = op_bench.random(NUM_TOKENS, 3, 64), op_bench.random(NUM_TOKENS, 1, 64, seed=1)
        op_bench.keeps(
            lambda ops, given: ops.rope(given["q"], given["k"], given["cos"], given["sin"]),
            {"q": q, "k": k, "cos": cos, "sin": sin},
        )

    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_activations_alone_and_gated(self, op_bench: OpBench, name: str) -> None:
        gate = op_bench.random(NUM_TOKENS, 48, scale=2)
        up = op_bench.random(NUM_TOKENS, 48, seed=1)
        found = op_bench.run(
            lambda ops, given: ops.activation(given["gate"], name), {"gate": gate}, {}
        )
        op_bench.close(found, activated(gate.double(), name))
        found = op_bench.run(
            lambda ops, given: ops.gated(given["gate"], given["up"], name),
            {"gate": gate, "up": up},
            {},
        )
        op_bench.close(found, activated(gate.double(), name) * up.double())

    def test_activations_leave_their_arguments_alone(self, op_bench: OpBench) -> None:
        gate, up = op_bench.random(NUM_TOKENS, 48), op_bench.random(NUM_TOKENS, 48, seed=1)
        for name in ACTIVATIONS[:: 3 if self.is_quick else 1]:

            def both(ops: Ops, given: Tensors, name: str = name) -> object:
                ops.activation(given["gate"], name)
                return ops.gated(given["gate"], given["up"], name)

            op_bench.keeps(both, {"gate": gate, "up": up})

    @pytest.mark.parametrize("count", [1, 2, 8])
    @pytest.mark.parametrize("normalise", [True, False])
    def test_route_gives_the_best_experts_and_their_shares(
        self, op_bench: OpBench, normalise: bool, count: int
    ) -> None:
        order = np.argsort(np.random.default_rng(1).random((NUM_TOKENS, 8)))
        logits = (torch.from_numpy(order) * 0.625 - 2).to(torch_dtype(op_bench.dtype))

        def op(which: int) -> Op:
            return lambda ops, given: ops.route(given["logits"], count, normalise=normalise)[which]

        weights = op_bench.run(op(0), {"logits": logits}, {}, dtype="float32")
        ids = op_bench.run(op(1), {"logits": logits}, {}, dtype="int32").long()
        share = torch.softmax(logits.double(), -1)
        best, wanted_ids = share.topk(count, -1)
        wanted = best / best.sum(-1, keepdim=True) if normalise else best
        assert torch.equal(ids.sort(-1).values, wanted_ids.sort(-1).values)
        spread, wanted_spread = (
            torch.zeros(NUM_TOKENS, 8, dtype=torch.float64).scatter(-1, at, found)
            for at, found in ((ids, weights), (wanted_ids, wanted))
        )
        op_bench.close(spread, wanted_spread, "float32")


def rows_of_many_sizes(bench: OpBench) -> Tensor:
    """[NUM_TOKENS, HIDDEN]: zeros, tiny, ordinary and large rows, among which eps and overflow show."""
    sizes = torch.tensor([0, 0.02, 0.3, 1, 1, 30, 400], dtype=torch.float64)
    return (bench.random(NUM_TOKENS, HIDDEN).double() * sizes[:, None]).to(torch_dtype(bench.dtype))


def normed(x: Tensor) -> Tensor:
    """float64: x over the root of its mean square."""
    wide = x.double()
    found: Tensor = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    return found


def turns(rotated: int) -> tuple[Tensor, Tensor]:
    """cos and sin f32 [NUM_TOKENS, rotated / 2]."""
    angle = torch.arange(NUM_TOKENS)[:, None] * 10 ** (-torch.arange(rotated // 2) / 8)
    return angle.cos(), angle.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [T, heads, D] with pairs of its first numbers rotated: neighbours, or those half of them apart."""
    out, half = x.clone(), cos.shape[-1]
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        c, s = cos[:, pair, None], sin[:, pair, None]
        out[..., a] = x[..., a] * c - x[..., b] * s
        out[..., b] = x[..., b] * c + x[..., a] * s
    return out


def activated(x: Tensor, name: str) -> Tensor:
    """float64 by the definitions."""
    share: Tensor
    match name:
        case "silu":
            share = 1 / (1 + torch.exp(-x))
        case "gelu":
            share = (1 + torch.special.erf(x / 2**0.5)) / 2
        case "gelu_tanh":
            share = (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
        case _:
            share = (x > 0).double()
    return x * share
