"""Whether two greedy texts that differ do so at a near tie, the one divergence that is excused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

GAP = 1e-3
"""Largest difference of the reference's two best logits at which either may be drawn."""
MAX_SHARE = 0.01
"""Of the requests may be excused (one, where there are fewer than 100)."""

Gap = Callable[[Sequence[int]], float]
"""By how much the reference's two best logits differ after a text."""


@dataclass
class Comparison:
    """Counts texts that are equal, excused and wrong."""

    gap: Gap
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
        shorter = min(len(ours), len(theirs))
        at = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
        gap = self.gap([*prompt, *theirs[:at]])
        row = f"{name} differs at token {at}, where the two best logits differ by {gap:.2g}"
        (self.excused if gap < GAP and at < shorter else self.wrong).append(row)

    def __str__(self) -> str:
        total = self.num_equal + len(self.excused) + len(self.wrong)
        return (
            f"{self.num_equal} of {total} texts equal, {len(self.excused)} excused {self.excused}"
        )

    def check(self) -> None:
        """Assert that there were texts, that none is wrong, and that few are excused."""
        total = self.num_equal + len(self.excused) + len(self.wrong)
        assert total > 0, "no texts were compared"
        assert not self.wrong, self.wrong
        assert len(self.excused) <= max(1, int(total * MAX_SHARE)), self.excused
