"""Linear layers: the door through which all weights enter, and what ranks and unlike parts make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...backends.collectives import Collectives
from ...backends.quantization import Linear, LinearSpec
from ..errors import UnsupportedArchitecture


def find_kernel(linear: Linear, spec: LinearSpec) -> tuple[str | None, str]:
    """The best kernel that takes a layer, and why; or None, and why each one does not."""
    verdicts = linear.kernels(spec)
    for verdict in verdicts:
        if verdict.ok:
            return verdict.kernel, verdict.reason
    return None, "; ".join(f"{verdict.kernel}: {verdict.reason}" for verdict in verdicts)


def require_kernel(linear: Linear, spec: LinearSpec) -> str:
    """The best kernel. Raises UnsupportedArchitecture where none takes the layer."""
    kernel, reason = find_kernel(linear, spec)
    if kernel is None:
        raise UnsupportedArchitecture(
            f"no kernel of this backend takes {spec.name} ({reason}); choose another checkpoint or --dtype"
        )
    return kernel


def bias_parts(bias: Tensor | None, parts: Sequence[int]) -> Sequence[Mapping[str, Tensor]]:
    """What Linear.build gets beside the weight of each part alone."""
    if bias is None:
        return [{} for _ in parts]
    return [{"bias": part.clone()} for part in torch.split(bias, list(parts))]


class SideBySide(nn.Module):
    """Linear layers of one input whose weights cannot be made one."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, K] -> the outputs of each."""
        return tuple(out for layer in self.layers for out in layer(x))


class RowParallel(nn.Module):
    """A row-parallel linear layer and the sum over the ranks."""

    def __init__(self, linear: nn.Module, comm: Collectives) -> None:
        super().__init__()
        self.linear = linear
        self.comm = comm

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in_features of this rank] -> [T, out_features]."""
        return self.comm.all_reduce(self.linear(x)[0], "tensor")
