"""Linear layers: their specs, and the door through which all weights enter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...backends.collectives import Collectives
from ...backends.quantization import Linear, LinearSpec
from ..errors import UnsupportedArchitecture


def build_linear(linear: Linear, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
    """x [T, in_features] -> one [T, n] for each part. Raises UnsupportedArchitecture where no kernel takes it."""
    verdicts = linear.kernels(spec)
    if not any(verdict.ok for verdict in verdicts):
        reasons = "; ".join(f"{verdict.kernel}: {verdict.reason}" for verdict in verdicts)
        raise UnsupportedArchitecture(
            f"no kernel of this backend takes {spec.name} ({reasons}); choose another checkpoint or --dtype"
        )
    return linear.build(spec, tensors)


class RowParallel(nn.Module):
    """A row-parallel linear layer and the sum over the ranks."""

    def __init__(self, linear: nn.Module, comm: Collectives) -> None:
        super().__init__()
        self.linear = linear
        self.comm = comm

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in_features of this rank] -> [T, out_features]."""
        return self.comm.all_reduce(self.linear(x)[0], "tensor")
