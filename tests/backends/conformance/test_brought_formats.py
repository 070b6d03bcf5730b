"""The kit on formats that come beside a plugin: it checks those that it can make, and says where there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from chipset.backends.conformance.quantization import LinearBench
from chipset.backends.conformance.quantization_packed import PackedSuite
from chipset.backends.conformance.suite import session, small_model
from chipset.backends.errors import Incompatible
from chipset.backends.formats import Axis, CheckpointFormat, Packed, Scheme, StoredTensor
from chipset.backends.quantization import LinearSpec, Verdict, WeightFormat
from chipset.backends.reference.quantization import PlainLinear, ReferenceLinear

from .reference_plugin import ReferencePlugin


class Cents(CheckpointFormat, Scheme):
    """Multiples of a hundredth, a byte each."""

    name = "cents"

    def read(self, config: Mapping[str, object] | None) -> Scheme:
        return self

    def stored(self, module: str, in_features: int, out_features: int) -> dict[str, StoredTensor]:
        axes = (Axis(of="out"), Axis(of="in"))
        return {"weight": StoredTensor(dtypes=("float32",), axes=axes)}

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:
        codes = (tensors["weight"] * 100).round().to(torch.int8)
        return Packed(format=WeightFormat(kind="cents"), tensors={"weight": codes})

    def dequantise(self, packed: Packed) -> Tensor:
        return packed.tensors["weight"].float() / 100


class Garbled(Cents):
    def dequantise(self, packed: Packed) -> Tensor:
        return super().dequantise(packed).flip(1)


class FilesOnly(Cents):
    def read(self, config: Mapping[str, object] | None) -> Scheme:
        if config is None:
            raise Incompatible("cents come in files; fetch some")
        return self


class CentsLinear(ReferenceLinear):
    divisor = 100

    def kernels(self, spec: LinearSpec) -> Sequence[Verdict]:
        if spec.weight.kind != "cents":
            return super().kernels(spec)
        return [Verdict(kernel="cents", ok=True, reason="multiplied as they are")]

    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        return PlainLinear(spec, tensors["weight"].float() / self.divisor, tensors.get("bias"))


class OffLinear(CentsLinear):
    divisor = 99


Check = Callable[..., None]


@pytest.fixture
def check() -> Check:
    def call(*formats: CheckpointFormat, linear: type[ReferenceLinear] = CentsLinear) -> None:
        class Brought(PackedSuite):
            def make_formats(self) -> Sequence[CheckpointFormat]:
                return formats

        with session(ReferencePlugin(linear=linear), small_model()) as opened:
            bench = LinearBench(session=opened, dtype="float32")
            Brought().test_a_format_that_the_plugin_brings_is_multiplied_as_it_says(bench)

    return call


def test_a_format_whose_kernel_agrees_with_it_passes(check: Check) -> None:
    check(Cents())


def test_a_kernel_that_reads_a_format_in_another_way_fails(check: Check) -> None:
    with pytest.raises(AssertionError, match="times the error that float32 allows"):
        check(Cents(), linear=OffLinear)


def test_a_format_that_gives_back_another_weight_fails(check: Check) -> None:
    with pytest.raises(AssertionError, match="cents is off by"):
        check(Garbled())


@pytest.mark.parametrize("formats", [(), (FilesOnly(),)])
def test_where_nothing_can_be_made_the_kit_says_so(
    check: Check, formats: tuple[CheckpointFormat, ...]
) -> None:
    with pytest.raises(pytest.skip.Exception, match="made while loading"):
        check(*formats)


def test_a_format_without_a_kernel_is_left_to_the_core(check: Check) -> None:
    with pytest.raises(pytest.skip.Exception, match="with a kernel"):
        check(Cents(), linear=ReferenceLinear)
