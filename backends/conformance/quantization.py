"""Linear layers, embeddings and experts with plain weights, against float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ..capabilities import Capabilities
from ..kv_cache import Cache
from ..options import EngineOptions
from ..plugin import Plugin
from ..quantization import EmbeddingSpec, LinearSpec, Verdict, WeightFormat
from ..reference.dtypes import torch_dtype
from ..step import StepInputs
from .modules import Reader
from .ops import DTYPES, activated
from .session import Session
from .suite import Suite, session, small_model
from .tokens import read_text, read_tokens
from .tolerance import excess

VOCAB, HIDDEN = 128, 64
NUM_EXPERTS, INNER = 5, 48
KINDS = ("plain", "int4", "int8", "fp8")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearBench:
    """A session, and the modules that its backend builds."""

    session: Session
    dtype: str

    def random(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        """Normal numbers of the bench's dtype, on the host."""
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return numbers.to(torch_dtype(self.dtype))

    def spec(self, parts: Sequence[int], in_features: int = HIDDEN, *, bias: bool) -> LinearSpec:
        """A linear layer of the bench's dtype."""
        return LinearSpec(
            name="conformance",
            in_features=in_features,
            out_features=sum(parts),
            parts=tuple(parts),
            bias=bias,
            dtype=self.dtype,
            out_dtype=self.dtype,
        )

    def tensors(self, spec: LinearSpec) -> dict[str, Tensor]:
        """Of such sizes that outputs are of order 1."""
        size = (spec.out_features, spec.in_features)
        found = {"weight": self.random(*size, seed=1, scale=spec.in_features**-0.5)}
        if spec.bias:
            found["bias"] = self.random(spec.out_features, seed=2)
        return found

    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        """See Linear.build."""
        with torch.inference_mode():
            return self.session.backend.linear.build(spec, tensors)

    def reader(self, module: nn.Module, tensors: Mapping[str, Tensor], part: int | None) -> Reader:
        """`module` on the tokens' rows of `tensors`, or on their ids; `part` of its outputs."""
        reader: Reader

        def compute(ids: Tensor, inputs: StepInputs, cache: Cache) -> tuple[Tensor, Cache]:  # noqa: ARG001
            given = [reader.get_buffer(name).index_select(0, ids) for name in tensors]
            out = reader.get_submodule("module")(*given or [ids])
            return (out if part is None else out[part]), cache

        reader = self.session.reader(compute, tensors)
        reader.add_module("module", module)
        return reader

    def check(
        self, module: nn.Module, spec: LinearSpec, x: Tensor, wanted: Tensor, counts: Sequence[int]
    ) -> None:
        """Each part of `module` on the first of `x`, for each of `counts` at a time."""
        for part, columns in enumerate(torch.split(wanted, list(spec.parts), -1)):
            reader = self.reader(module, {"x": x}, part)
            for count in counts:
                found = read_tokens(self.session, reader, range(count))
                self.close(found, columns[:count], spec.out_dtype)
            if len(counts) > 1:
                found = read_text(self.session, reader, range(len(x)))
                self.close(found, columns[-len(found) :], spec.out_dtype)

    def close(self, found: np.ndarray, wanted: Tensor, dtype: str) -> None:
        """Within what the dtype allows."""
        assert found.shape == tuple(wanted.shape)
        error = excess(found, wanted.numpy(), dtype)
        assert error <= 1, f"{error:.1f} times the error that {dtype} allows"


class LinearSuite(Suite):
    """Linear layers, and whatever else holds weights."""

    @pytest.fixture(params=DTYPES)
    def linear_bench(
        self, request: pytest.FixtureRequest, plugin: Plugin, capabilities: Capabilities
    ) -> Iterator[LinearBench]:
        """A session of each dtype that the backend claims."""
        dtype = str(request.param)
        self.require(dtype in capabilities.dtypes, f"dtype {dtype} not claimed")
        options = EngineOptions(dtype=dtype, max_batch_rows=8)
        model = small_model(vocab_size=VOCAB, dtype=dtype)
        with session(plugin, model, options) as opened:
            yield LinearBench(session=opened, dtype=dtype)

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_format_has_a_verdict_with_its_reason(
        self, linear_bench: LinearBench, kind: str
    ) -> None:
        weight = WeightFormat(kind=kind, group_size=None if kind == "plain" else 32)
        spec = replace(linear_bench.spec((32, 16), bias=True), weight=weight)
        for num_experts in (0, NUM_EXPERTS):
            verdicts = linear_bench.session.backend.linear.kernels(
                replace(spec, num_experts=num_experts)
            )
            assert verdicts, f"no verdict on {kind} weights"
            for verdict in verdicts:
                assert isinstance(verdict, Verdict)
                assert verdict.kernel
                assert verdict.reason.strip(), f"{verdict.kernel} gives no reason"
            if kind == "plain":
                assert any(verdict.ok for verdict in verdicts), "plain weights are refused"

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("parts", [(48, 16, 16), (33, 7), (40,)])
    def test_a_layer_gives_one_product_for_each_part(
        self, linear_bench: LinearBench, parts: tuple[int, ...], bias: bool
    ) -> None:
        spec = linear_bench.spec(parts, bias=bias)
        tensors = linear_bench.tensors(spec)
        x = linear_bench.random(7, HIDDEN, seed=3)
        module = linear_bench.build(spec, tensors)
        counts = (7,) if self.is_quick else (1, 2, 7)
        linear_bench.check(module, spec, x, product(x, tensors), counts)

    def test_a_layer_gives_as_many_outputs_as_it_has_parts(self, linear_bench: LinearBench) -> None:
        spec = linear_bench.spec((24, 8), bias=False)
        module = linear_bench.build(spec, linear_bench.tensors(spec))
        shapes: list[tuple[int, ...]] = []
        reader: Reader

        def compute(ids: Tensor, inputs: StepInputs, cache: Cache) -> tuple[Tensor, Cache]:  # noqa: ARG001
            x = reader.get_buffer("x").index_select(0, ids)
            outs = reader.get_submodule("module")(x)
            shapes.append(tuple(out.shape[1] for out in outs))
            return outs[0], cache

        reader = linear_bench.session.reader(compute, {"x": linear_bench.random(2, HIDDEN)})
        reader.add_module("module", module)
        read_tokens(linear_bench.session, reader, range(2))
        assert set(shapes) == {(24, 8)}

    def test_a_wide_layer_is_right_for_one_token_and_for_many(
        self, linear_bench: LinearBench
    ) -> None:
        spec = linear_bench.spec((512, 256), 256, bias=True)
        tensors = linear_bench.tensors(spec)
        x = linear_bench.random(29, 256, seed=3)
        wanted = product(x, tensors)
        counts = (1, 29) if self.is_quick else (1, 5, 8, 29)
        linear_bench.check(linear_bench.build(spec, tensors), spec, x, wanted, counts)

    def test_the_head_gives_float32_that_no_narrower_dtype_rounded(
        self, linear_bench: LinearBench
    ) -> None:
        spec = replace(linear_bench.spec((VOCAB,), bias=False), out_dtype="float32")
        tensors = linear_bench.tensors(spec)
        x = linear_bench.random(7, HIDDEN, seed=3)
        module = linear_bench.build(spec, tensors)
        linear_bench.check(module, spec, x, product(x, tensors), (7,) if self.is_quick else (1, 7))

    def test_an_embedding_gives_the_rows_of_its_ids(self, linear_bench: LinearBench) -> None:
        weight = linear_bench.random(VOCAB, HIDDEN, seed=4)
        embedding, head = self._embed(linear_bench, weight, 0, None)
        assert head is None
        ids = (0, 1, 64, 65, 126, 127, 0)
        found = read_tokens(linear_bench.session, linear_bench.reader(embedding, {}, None), ids)
        np.testing.assert_array_equal(found, weight[list(ids)].float().numpy())

    def test_a_part_of_the_vocabulary_gives_zeros_for_the_rest(
        self, linear_bench: LinearBench
    ) -> None:
        weight = linear_bench.random(30, HIDDEN, seed=4)
        embedding, _ = self._embed(linear_bench, weight, 40, None)
        ids = (0, 39, 40, 41, 69, 70, 127)
        found = read_tokens(linear_bench.session, linear_bench.reader(embedding, {}, None), ids)
        wanted = torch.zeros(len(ids), HIDDEN)
        wanted[2:5] = weight[[0, 1, 29]].float()
        np.testing.assert_array_equal(found, wanted.numpy())

    def test_a_tied_head_multiplies_by_the_embedding(self, linear_bench: LinearBench) -> None:
        weight = linear_bench.random(VOCAB, HIDDEN, seed=4, scale=HIDDEN**-0.5)
        spec = replace(linear_bench.spec((VOCAB,), bias=False), out_dtype="float32")
        embedding, head = self._embed(linear_bench, weight, 0, spec)
        assert head is not None
        x = linear_bench.random(7, HIDDEN, seed=5)
        linear_bench.check(head, spec, x, product(x, {"weight": weight}), (7,))
        found = read_tokens(
            linear_bench.session, linear_bench.reader(embedding, {}, None), (3, 127)
        )
        np.testing.assert_array_equal(found, weight[[3, 127]].float().numpy())

    def test_a_tied_head_holds_no_second_weight(self, linear_bench: LinearBench) -> None:
        weight = linear_bench.random(VOCAB, HIDDEN, seed=4)
        spec = replace(linear_bench.spec((VOCAB,), bias=False), out_dtype="float32")
        alone, _ = self._embed(linear_bench, weight, 0, None)
        embedding, head = self._embed(linear_bench, weight, 0, spec)
        assert head is not None
        num_bytes, tied = held_bytes(alone), held_bytes(nn.ModuleList([embedding, head]))
        assert tied < 1.5 * num_bytes, f"{tied} bytes with the head, {num_bytes} without"

    @pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
    @pytest.mark.parametrize("chosen", [1, 2, NUM_EXPERTS])
    def test_experts_add_up_by_their_weights(
        self, linear_bench: LinearBench, chosen: int, activation: str
    ) -> None:
        if (chosen, activation) != (2, "silu"):
            self.thorough()
        up = replace(linear_bench.spec((INNER, INNER), bias=False), num_experts=NUM_EXPERTS)
        down = replace(linear_bench.spec((HIDDEN,), INNER, bias=False), num_experts=NUM_EXPERTS)
        weights = {
            "gate_up": linear_bench.random(
                NUM_EXPERTS, 2 * INNER, HIDDEN, seed=1, scale=HIDDEN**-0.5
            ),
            "down": linear_bench.random(NUM_EXPERTS, HIDDEN, INNER, seed=2, scale=INNER**-0.5),
        }
        x = linear_bench.random(7, HIDDEN, seed=3)
        order = np.argsort(np.random.default_rng(2).random((7, NUM_EXPERTS)))[:, :chosen]
        ids = torch.from_numpy(order.astype(np.int32))
        share = torch.rand(7, chosen, generator=torch.Generator().manual_seed(5)) + 0.1
        with torch.inference_mode():
            tensors = {name: {"weight": weight} for name, weight in weights.items()}
            module = linear_bench.session.backend.linear.build_experts(
                up, down, tensors, activation
            )
        reader = linear_bench.reader(module, {"x": x, "weights": share, "ids": ids}, None)
        wanted = mixed(x, weights["gate_up"], weights["down"], share, ids, activation)
        for count in (7,) if self.is_quick else (1, 7):
            found = read_tokens(linear_bench.session, reader, range(count))
            linear_bench.close(found, wanted[:count], linear_bench.dtype)

    def _embed(
        self, linear_bench: LinearBench, weight: Tensor, first_row: int, head: LinearSpec | None
    ) -> tuple[nn.Module, nn.Module | None]:
        spec = EmbeddingSpec(
            first_row=first_row, num_rows=len(weight), hidden_size=HIDDEN, dtype=linear_bench.dtype
        )
        with torch.inference_mode():
            return linear_bench.session.backend.linear.build_embedding(spec, weight, head)


def product(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """float64 [T, N]."""
    found = x.double() @ tensors["weight"].double().T
    return found + tensors["bias"].double() if "bias" in tensors else found


def mixed(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, activation: str
) -> Tensor:
    """float64 [T, H]: the sum over each token's experts, the gate before the other half."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            out[token] += weight * (down[expert].double() @ (activated(gate, activation) * up))
    return out


def held_bytes(module: nn.Module) -> int:
    """Of the memory behind the tensors that a module holds: all of it, however little of it they show, and once."""
    largest: dict[int, int] = {}
    for tensor in (*module.buffers(), *module.parameters()):
        storage = tensor.untyped_storage()
        place = storage.data_ptr() or id(tensor)
        largest[place] = max(largest.get(place, 0), tensor.nbytes, storage.nbytes())
    return sum(largest.values())
