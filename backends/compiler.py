"""Graphs: how a step becomes one, and the promise that none is made after warm-up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from .shapes import Bucket


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileReport:
    """What warm-up made."""

    num_graphs: int
    """Made in warm-up."""
    seconds: float
    """Taken by warm-up."""
    bytes_reserved: int
    """On the device, for graphs."""


class Compiler(ABC):
    """Default: nothing is compiled."""

    @abstractmethod
    def wrap(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """The function that runs `module` on what Backend.prepare made in place of StepInputs.

        `module` is "model": (StepInputs, Cache) -> (logits [L, V] f32, Cache), or "draw": (StepInputs, Cache, logits)
        -> (StepOutput, Cache), or with fused_draw "step": (StepInputs, Cache) -> (StepOutput, Cache). Every device
        tensor it uses is an argument or a buffer of it, rope tables too. Where the step has no rows of logits, "draw"
        is not called.

        "model" reads all of the inputs but features and sampling, "draw" only features, sampling and num_logits of the
        bucket: a compiler takes the rest away before it looks a graph up, or each variant costs a model graph and each
        bucket a draw graph. Several modules may be wrapped under one name.

        The caller gives the cache away and rebinds the one returned. Ask for donation only once the step is traced, and
        only of the leaves that it replaced: the others are the same objects in the cache returned.
        """

    def warm_up(
        self,
        runs: Sequence[tuple[Bucket, frozenset[str]]],
        run: Callable[[Bucket, frozenset[str]], None],
        progress: Callable[[int], None],
    ) -> CompileReport:
        """`run` drives prepare, the wrapped functions and fetch on an all-padding batch, for each of `runs`."""
        for done, (bucket, features) in enumerate(runs):
            run(bucket, features)
            progress(done + 1)
        return CompileReport(num_graphs=0, seconds=0.0, bytes_reserved=0)

    def freeze(self) -> AbstractContextManager[None]:
        """Inside, what would compile raises UnexpectedCompile instead."""
        return nullcontext()
