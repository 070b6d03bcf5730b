"""Numbers on two beads, each a sign and a power of two, and linear layers whose weights are kept so."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from chipset.backends.formats import Axis, Packed, Scheme, StoredTensor
from chipset.backends.quantization import LinearSpec, Verdict, WeightFormat
from chipset.backends.reference.quantization import PlainLinear, ReferenceLinear
from chipset.backends.reference.telemetry import Counters, Counting
from torch import Tensor, nn

FORMAT = WeightFormat(kind="abacus")


def values() -> Tensor:
    """f32 [256]: what each byte stands for. A half byte is a bead: a sign, and 2**0 to 2**-7."""
    bead = torch.tensor([sign * 2.0**-power for sign in (1, -1) for power in range(8)])
    return (bead[:, None] + bead).reshape(-1)


def encode(weight: Tensor) -> dict[str, Tensor]:
    """[..., N, K] -> weight u8 [..., N, K], the nearest bytes, and scale f32 [..., N]."""
    scale = weight.float().abs().amax(-1).clamp(min=1e-30) / 2
    ordered, byte = values().sort()
    nearest = torch.bucketize(weight / scale[..., None], (ordered[1:] + ordered[:-1]) / 2)
    return {"weight": byte[nearest].to(torch.uint8), "scale": scale}


def decode(codes: Tensor) -> Tensor:
    """u8 -> f32, not scaled."""
    return values().index_select(0, codes.reshape(-1).int()).reshape(codes.shape)


class AbacusScheme(Scheme):
    """weight u8 [N, K] and scale f32 [N] for each layer NAME_proj, stored so or made while loading."""

    name = "abacus"

    def __init__(self, *, is_stored: bool) -> None:
        self.is_stored = is_stored

    def stored(self, module: str, in_features: int, out_features: int) -> Mapping[str, StoredTensor] | None:
        """See Scheme.stored."""
        axes = (Axis(of="out"), Axis(of="in"))
        weight = StoredTensor(dtypes=("uint8",) if self.is_stored else ("float32", "bfloat16", "float16"), axes=axes)
        scale = {"scale": StoredTensor(dtypes=("float32",), axes=axes[:1])} if self.is_stored else {}
        return {"weight": weight, **scale} if module.endswith("_proj") else None

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:
        """See Scheme.pack."""
        return Packed(format=FORMAT, tensors=tensors if self.is_stored else encode(tensors["weight"]))

    def dequantise(self, packed: Packed) -> Tensor:
        """See Scheme.dequantise."""
        return decode(packed.tensors["weight"]) * packed.tensors["scale"][..., None]


class AbacusLinear(Counting, ReferenceLinear):
    """Keeps weights on beads; all others are the reference's."""

    def kernels(self, spec: LinearSpec) -> Sequence[Verdict]:
        """See Linear.kernels."""
        beads = Verdict(kernel="beads", ok=True, reason="multiplied as they are")
        return [beads] if spec.weight == FORMAT and not spec.num_experts else super().kernels(spec)

    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        """See Linear.build."""
        if spec.weight != FORMAT:
            return super().build(spec, tensors)
        return BeadLinear(spec, self._put(tensors), self.counters)


class BeadLinear(PlainLinear):
    """x times the beads, then the scale of each output."""

    def __init__(self, spec: LinearSpec, tensors: Mapping[str, Tensor], counters: Counters) -> None:
        super().__init__(spec, tensors["weight"], tensors.get("bias"))
        self.scale = nn.Buffer(tensors["scale"])
        self.counters = counters

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """See Linear.build."""
        self.counters["bead_products"] += 1
        out = F.linear(x.float(), decode(self.weight)) * self.scale + (0 if self.bias is None else self.bias)
        return torch.split(out.to(self.out_dtype), self.parts, -1)
