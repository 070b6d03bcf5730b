"""A compiler that compiles nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..compiler import Compiler
from ..step import Prepared, StepInputs
from .staging import unpack


class EagerCompiler(Compiler):
    """Runs modules op by op; `unpack` makes StepInputs of what Backend.prepare made."""

    def __init__(self, unpack: Callable[[Any], StepInputs] = unpack) -> None:
        self.unpack = unpack

    def wrap(self, name: str, module: nn.Module) -> Callable[..., Any]:  # noqa: ARG002
        """Unpack, then call."""

        def run(prepared: Prepared, *rest: Any) -> Any:
            with torch.inference_mode():
                return module(self.unpack(prepared), *rest)

        return run
