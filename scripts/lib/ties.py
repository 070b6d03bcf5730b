"""Whether two greedy texts that differ do so at a near tie, the one divergence that is excused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

GAP = 1e-3
"""Largest difference of the reference's two best logits at which either may be drawn."""
MAX_SHARE = 0.01
"""Of the requests may be excused (one, where there are fewer than 100)."""

Logits = Callable[[Sequence[int]], torch.Tensor]
"""The reference's logits [V] after a text."""


@dataclass
class Comparison:
    """Counts texts that are equal, excused and wrong."""

    logits: Logits
    num_equal: int = 0
    excused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(
        self, name: str, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]
    ) -> None:
        """Compare two continuations of `prompt`."""
        if list(ours) == list(theirs):
            self.num_equal += 1
            return
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        best = self.logits([*prompt, *theirs[:at]]).topk(2).values
        gap = (best[0] - best[1]).item()
        row = f"{name} differs at token {at}, where the two best logits differ by {gap:.2g}"
        (self.excused if gap < GAP and at < min(len(ours), len(theirs)) else self.wrong).append(row)

    def check(self) -> None:
        """Assert that nothing is wrong and little is excused; prints the counts."""
        total = self.num_equal + len(self.excused) + len(self.wrong)
        print(
            f"{self.num_equal} of {total} texts equal, {len(self.excused)} excused: {self.excused}"
        )
        assert total > 0
        assert not self.wrong, self.wrong
        assert len(self.excused) <= max(1, int(total * MAX_SHARE)), self.excused
