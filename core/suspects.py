"""Suspects: the requests of a step that failed, run apart until the one at fault stands alone.

a b c d  fail together         groups  [a b] [c d]
a b      fail again            groups  [a] [b] [c d]
a        gets past             groups  [b] [c d]
b        fails alone           it is at fault;  groups  [c d]
c d      get past              none left
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from .request import Request

Eligible = Callable[[Request], bool]


class Suspects:
    """Groups of requests, each with the number of computed tokens at which it has got past the failure."""

    def __init__(self) -> None:
        self._groups: list[dict[Request, int]] = []

    def __contains__(self, request: Request) -> bool:
        return any(request in group for group in self._groups)

    def __len__(self) -> int:
        return sum(len(group) for group in self._groups)

    def turns(self) -> Iterator[Eligible]:
        """Who may run in the next step: the first group; where it cannot, the next; at last those never suspected."""
        for group in self._groups:
            yield group.__contains__
        yield lambda request: request not in self

    def blame(self, goals: Mapping[Request, int]) -> Request | None:
        """A step failed for these requests: the one at fault, if there is only one; else they are halved.

        `goals`: the number of tokens of each that would have been computed after the step.
        """
        self.forget(goals)
        if len(goals) == 1:
            return next(iter(goals))
        suspects = list(goals.items())
        middle = len(suspects) // 2
        self._groups[:0] = [dict(suspects[:middle]), dict(suspects[middle:])]
        return None

    def acquit(self) -> None:
        """Forget those that have got past."""
        past = [r for group in self._groups for r, goal in group.items() if r.num_computed >= goal]
        self.forget(past)

    def forget(self, requests: Collection[Request]) -> None:
        """Forget these, whether they are suspects or not."""
        for request in requests:
            for group in self._groups:
                group.pop(request, None)
        self._groups = [group for group in self._groups if group]
