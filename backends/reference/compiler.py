"""A compiler that compiles nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..compiler import Compiler
from .staging import Staged, unpack


class EagerCompiler(Compiler):
    """Runs modules op by op on what `stage` made."""

    def wrap(self, name: str, module: nn.Module) -> Callable[..., Any]:  # noqa: ARG002
        """Unpack, then call."""

        def run(prepared: Staged, *rest: Any) -> Any:
            with torch.inference_mode():
                return module(unpack(prepared), *rest)

        return run
