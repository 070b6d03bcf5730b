"""Linear layers and experts with packed weights: what they multiply by, what they hold, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ..capabilities import Capabilities
from ..errors import Incompatible
from ..formats import CheckpointFormat
from ..options import EngineOptions
from ..plugin import Plugin
from ..quantization import Linear, LinearSpec, WeightFormat
from ..registry import Registry
from ..step import F32
from .ops import DTYPES
from .packed_weights import F64, FORMATS, QUICK, format_name, input_slack, make_packed, worth
from .quantization import LinearBench, held_bytes, mixed
from .suite import Suite, session, small_model
from .tokens import read_text, read_tokens
from .tolerance import excess

VOCAB = 128
IN, OUT = 256, 144
"""Whole groups of every form, blocks cut off at both ends, and outputs in sixteens, as kernels like them."""
NUM_EXPERTS, HIDDEN, INNER = 3, 64, 96
NUM_TOKENS, NUM_TOGETHER = 29, 7
"""Rows of a text, and of tokens that are decoded."""


def _params(formats: Sequence[WeightFormat]) -> list[object]:
    return [pytest.param(form, id=format_name(form)) for form in formats]


def _fits_experts(form: WeightFormat) -> bool:
    size = form.group_size or 1
    return form.activation == "none" and HIDDEN % size == INNER % size == 0


ONE_A_KIND = [next(f for f in FORMATS if f.kind == kind) for kind in ("int4", "int8", "fp8")]
WITH_EXPERTS = [form for form in FORMATS if _fits_experts(form)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A packed layer, what goes in, and what should come out."""

    spec: LinearSpec
    tensors: Mapping[str, Tensor]
    x: Tensor
    """[NUM_TOKENS, IN]"""
    weight: F64
    """[N, IN]"""

    @property
    def wanted(self) -> F64:
        """[NUM_TOKENS, N]"""
        return self.x.double().numpy() @ self.weight.T + self.bias

    @property
    def bias(self) -> F64:
        """[N]"""
        found = self.tensors.get("bias")
        return np.zeros(len(self.weight)) if found is None else found.double().numpy()

    @property
    def unit(self) -> F64:
        """[NUM_TOKENS, N]: about the size of each output, in which errors are counted."""
        x = self.x.double().numpy()
        size = np.sqrt((x**2).mean(1, keepdims=True)) * np.sqrt((self.weight**2).sum(1))
        found: F64 = np.sqrt(size**2 + self.bias**2)
        return np.where(found > 0, found, 1.0)

    def check(self, found: F32, rows: slice, outputs: slice) -> None:
        """`found`: those outputs of those rows."""
        unit, wanted = self.unit[rows, outputs], self.wanted[rows, outputs]
        assert found.shape == wanted.shape
        slack = input_slack(self.spec.weight, self.x.double().numpy(), self.weight)
        error = found - wanted
        beyond = np.sign(error) * np.maximum(np.abs(error) - slack[rows, outputs], 0)
        times = excess((wanted + beyond) / unit, wanted / unit, self.spec.out_dtype)
        assert times <= 1, f"{times:.1f} times the error that {self.spec.out_dtype} allows"


class PackedSuite(Suite):
    """Packed weights; what a backend has no kernel for is skipped, with the reason that it gives."""

    def make_formats(self) -> Sequence[CheckpointFormat]:
        """Formats that come beside the plugin under test; whoever overrides make_plugin may override this."""
        return Registry.discover().formats(self.backend) if self.backend else ()

    @pytest.fixture(params=DTYPES)
    def packed_bench(
        self, request: pytest.FixtureRequest, plugin: Plugin, capabilities: Capabilities
    ) -> Iterator[LinearBench]:
        """A session of each dtype that the backend claims."""
        dtype = str(request.param)
        self.require(dtype in capabilities.dtypes, f"dtype {dtype} not claimed")
        options = EngineOptions(dtype=dtype, max_batch_rows=8)
        model = small_model(vocab_size=VOCAB, dtype=dtype)
        with session(plugin, model, options) as opened:
            yield LinearBench(session=opened, dtype=dtype)

    @pytest.mark.parametrize("form", _params(FORMATS))
    def test_a_packed_layer_multiplies_by_what_its_numbers_are_worth(
        self, packed_bench: LinearBench, form: WeightFormat
    ) -> None:
        self._select_format(form)
        layer = self._packed_layer(packed_bench, form, (OUT,))
        self._check_layer(packed_bench, layer)

    @pytest.mark.parametrize("form", _params(ONE_A_KIND))
    def test_a_packed_layer_has_parts_and_a_bias(
        self, packed_bench: LinearBench, form: WeightFormat
    ) -> None:
        for parts in ((96, 32, 16), (33, 7)):
            layer = self._packed_layer(packed_bench, form, parts, bias=True)
            self._check_layer(packed_bench, layer)

    @pytest.mark.parametrize("form", _params(ONE_A_KIND))
    def test_each_scale_counts_however_large_or_small(
        self, packed_bench: LinearBench, form: WeightFormat
    ) -> None:
        layer = self._packed_layer(packed_bench, form, (OUT,))
        most = 3 if packed_bench.dtype == "float16" else 30
        power = torch.linspace(-most, most, OUT).round()[:, None]
        tensors = {**layer.tensors, "scale": layer.tensors["scale"] * 2.0**power}
        weight = worth(form, tensors, IN)
        self._check_layer(packed_bench, replace(layer, tensors=tensors, weight=weight))

    @pytest.mark.parametrize("form", _params(WITH_EXPERTS))
    def test_packed_experts_add_up_by_their_weights(
        self, packed_bench: LinearBench, form: WeightFormat
    ) -> None:
        self._select_format(form)
        self._check_experts(packed_bench, form, form)

    @pytest.mark.parametrize("form", _params(ONE_A_KIND))
    def test_one_weight_of_packed_experts_may_be_plain(
        self, packed_bench: LinearBench, form: WeightFormat
    ) -> None:
        self.thorough()
        self._check_experts(packed_bench, form, WeightFormat())
        self._check_experts(packed_bench, WeightFormat(), form)

    @pytest.mark.parametrize("form", _params(ONE_A_KIND))
    def test_a_packed_weight_stays_as_it_is(
        self, packed_bench: LinearBench, form: WeightFormat
    ) -> None:
        layer = self._packed_layer(packed_bench, form, (OUT,))
        reader = packed_bench.reader(self._build_packed(packed_bench, layer), {"x": layer.x}, 0)
        first = read_tokens(packed_bench.session, reader, range(NUM_TOGETHER))
        read_text(packed_bench.session, reader, range(NUM_TOKENS))
        again = read_tokens(packed_bench.session, reader, range(NUM_TOGETHER))
        np.testing.assert_array_equal(first, again)

    @pytest.mark.parametrize("form", _params(ONE_A_KIND))
    def test_a_packed_layer_holds_no_more_than_its_format(
        self, packed_bench: LinearBench, form: WeightFormat
    ) -> None:
        layer = self._packed_layer(packed_bench, form, (OUT,))
        held = held_bytes(self._build_packed(packed_bench, layer))
        most = 1.25 * sum(tensor.nbytes for tensor in layer.tensors.values())
        assert held <= most, f"{held} bytes, where the format and a quarter has {most:.0f}"

    def test_every_packed_format_has_its_verdicts(self, packed_bench: LinearBench) -> None:
        for form in FORMATS:
            spec = _spec(packed_bench, form, (OUT,), bias=True)
            for num_experts in (0, NUM_EXPERTS):
                verdicts = packed_bench.session.backend.linear.kernels(
                    replace(spec, num_experts=num_experts)
                )
                assert verdicts, f"no verdict on {format_name(form)}"
                for verdict in verdicts:
                    assert verdict.kernel
                    assert verdict.reason.strip(), f"{verdict.kernel} gives no reason"

    def test_a_format_that_the_plugin_brings_is_multiplied_as_it_says(
        self, packed_bench: LinearBench
    ) -> None:
        found = [self._made_layer(packed_bench, form) for form in self.make_formats()]
        layers = [layer for layer in found if layer is not None]
        self.require(layers, "no format of its own that is made while loading, with a kernel")
        for layer in layers:
            self._check_layer(packed_bench, layer)

    def test_a_kind_that_no_plugin_brought_is_refused(self, packed_bench: LinearBench) -> None:
        spec = _spec(packed_bench, WeightFormat(kind="nobody's"), (OUT,))
        assert _refusal(packed_bench.session.backend.linear, spec)

    def _packed_layer(
        self,
        bench: LinearBench,
        weight: WeightFormat,
        parts: tuple[int, ...],
        *,
        bias: bool = False,
    ) -> Layer:
        """Skips where no kernel takes it."""
        spec = _spec(bench, weight, parts, bias=bias)
        refusal = _refusal(bench.session.backend.linear, spec)
        self.require(refusal is None, f"{weight.kind}: {refusal}")
        x = bench.random(NUM_TOKENS, IN, seed=3)
        if weight.activation != "static_tensor":
            x[1] *= 100  # a token must not lose precision to another
        largest = float(x.abs().max())
        tensors = make_packed(weight, spec.out_features, IN, seed=1, largest_input=largest)
        found = worth(weight, tensors, IN)
        if bias:
            tensors["bias"] = bench.random(spec.out_features, seed=2)
        return Layer(spec=spec, tensors=tensors, x=x, weight=found)

    def _made_layer(self, bench: LinearBench, form: CheckpointFormat) -> Layer | None:
        """Of a plain weight; None where the format only reads files of its own, or no kernel takes it."""
        name = "model.layers.0.mlp.down_proj"
        try:
            scheme = form.read(None)
        except Incompatible:
            return None
        if set(scheme.stored(name, IN, OUT) or ()) != {"weight"}:
            return None
        plain = bench.random(OUT, IN, seed=1, scale=IN**-0.5).float()
        packed = scheme.pack(name, {"weight": plain.clone()})
        told = scheme.dequantise(packed)
        weight = worth(packed.format, packed.tensors, IN) if told is None else told.double().numpy()
        off = np.linalg.norm(weight - plain.numpy()) / np.linalg.norm(plain.numpy())
        assert off < 0.5, f"{form.name} is off by {off:.0%} of the weight"
        spec = _spec(bench, packed.format, (OUT,))
        if _refusal(bench.session.backend.linear, spec) is not None:
            return None
        x = bench.random(NUM_TOKENS, IN, seed=3)
        return Layer(spec=spec, tensors=packed.tensors, x=x, weight=weight)

    def _build_packed(self, bench: LinearBench, layer: Layer) -> nn.Module:
        # copies, for what is built may keep them, and repack them in place
        return bench.build(layer.spec, {name: t.clone() for name, t in layer.tensors.items()})

    def _check_layer(self, bench: LinearBench, layer: Layer) -> None:
        """Each part: one row alone, some together, and all as one text."""
        module = self._build_packed(bench, layer)
        first = 0
        for part, size in enumerate(layer.spec.parts):
            outputs = slice(first, first + size)
            first += size
            reader = bench.reader(module, {"x": layer.x}, part)
            for count in (1, NUM_TOGETHER):
                found = read_tokens(bench.session, reader, range(count))
                layer.check(found, slice(count), outputs)
            found = read_text(bench.session, reader, range(NUM_TOKENS))
            layer.check(found, slice(NUM_TOKENS - len(found), NUM_TOKENS), outputs)

    def _check_experts(self, bench: LinearBench, gate_up: WeightFormat, down: WeightFormat) -> None:
        specs = {
            "gate_up": _spec(bench, gate_up, (INNER, INNER), HIDDEN),
            "down": _spec(bench, down, (HIDDEN,), INNER),
        }
        linear, tensors, weights = bench.session.backend.linear, {}, {}
        for number, (name, spec) in enumerate(specs.items()):
            specs[name] = replace(spec, num_experts=NUM_EXPERTS)
            refusal = _refusal(linear, specs[name])
            self.require(refusal is None, f"{spec.weight.kind} experts: {refusal}")
            tensors[name], weights[name] = _expert_weights(bench, spec, seed=10 * number)
        x = bench.random(NUM_TOGETHER, HIDDEN, seed=3)
        ids = torch.tensor([[0, 1], [2, 1], [1, 0], [0, 2], [1, 2], [0, 1], [1, 0]]).int()
        share = torch.rand(ids.shape, generator=torch.Generator().manual_seed(5)) + 0.1
        with torch.inference_mode():
            module = linear.build_experts(specs["gate_up"], specs["down"], tensors, "silu")
        reader = bench.reader(module, {"x": x, "weights": share, "ids": ids}, None)
        wanted = mixed(x, weights["gate_up"], weights["down"], share, ids, "silu")
        for count in (1, NUM_TOGETHER):
            found = read_tokens(bench.session, reader, range(count))
            bench.close(found, wanted[:count], bench.dtype)

    def _select_format(self, form: WeightFormat) -> None:
        if form not in QUICK:
            self.thorough()


def _spec(
    bench: LinearBench,
    weight: WeightFormat,
    parts: tuple[int, ...],
    in_features: int = IN,
    *,
    bias: bool = False,
) -> LinearSpec:
    return replace(bench.spec(parts, in_features, bias=bias), weight=weight)


def _refusal(linear: Linear, spec: LinearSpec) -> str | None:
    """Why no kernel takes the layer; None where one does."""
    verdicts = linear.kernels(spec)
    if any(verdict.ok for verdict in verdicts):
        return None
    return "; ".join(verdict.reason for verdict in verdicts) or "no verdict"


def _expert_weights(
    bench: LinearBench, spec: LinearSpec, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Canonical tensors [E, ...], and what they are worth: float64 [E, N, K]."""
    size = (spec.out_features, spec.in_features)
    if spec.weight.kind == "plain":
        plain = bench.random(NUM_EXPERTS, *size, seed=seed, scale=spec.in_features**-0.5)
        return {"weight": plain}, plain.double()
    each = [make_packed(spec.weight, *size, seed=seed + index) for index in range(NUM_EXPERTS)]
    weight = [torch.from_numpy(worth(spec.weight, one, spec.in_features)) for one in each]
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}, torch.stack(weight)
