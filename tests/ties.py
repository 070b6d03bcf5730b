"""The near-tie rule, for references that give logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from chipset.core.conformance.ties import Gap


def gap_of(logits: Callable[[Sequence[int]], torch.Tensor]) -> Gap:
    """From the logits [V] after a text to the difference of the two best."""

    def gap(text: Sequence[int]) -> float:
        best = logits(text).topk(2).values
        return (best[0] - best[1]).item()

    return gap
