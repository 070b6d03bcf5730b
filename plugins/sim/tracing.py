"""A module as a graph of device operations, made without running it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ...backends.errors import ChipsetError
from .rules import RuleBroken

READING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def trace(name: str, module: nn.Module, weights: Mapping[str, Tensor], args: Any) -> fx.GraphModule:
    """(weights, *args) -> what module(*args) returns, on tensors without values.

    Raises RuleBroken where Python looks at a value, a shape depends on one, or a tensor is no argument and no weight.
    """

    def run(weights: dict[str, Tensor], *args: Any) -> Any:
        return torch.func.functional_call(module, weights, args)

    try:
        graph = make_fx(run, tracing_mode="fake")(dict(weights), *args)
    except ChipsetError:
        raise
    except Exception as error:  # torch has no one class for what it cannot trace
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuleBroken("traced steps", f"{name} cannot be traced: {first_line}") from error
    constants = [held for held, _ in graph.named_buffers()]
    if constants:
        raise RuleBroken("traced steps", f"{name} has constants in its graph: {constants}")
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and any(
            tag in node.target.tags for tag in READING
        ):
            raise RuleBroken("traced steps", f"{name} reads values on the device: {node.target}")
    return graph
