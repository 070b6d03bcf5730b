"""Scheduler: which tokens of which requests the next step computes.

Pure: no torch, no clock, no I/O. It decides from data alone, so that random traces can be checked against a model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..backends.capabilities import Capabilities
from ..backends.errors import TooLarge
from ..backends.shapes import BatchShape, Bucket, Phase, ShapePolicy
from .errors import InvalidRequest
from .kv_cache.manager import BlockTable, KVCacheManager
from .request import Request
from .suspects import Eligible, Suspects


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Tokens `[start, start + count)` of a request."""

    request: Request
    start: int
    count: int
    is_decode: bool

    @property
    def end(self) -> int:
        """Tokens of the request after the step."""
        return self.start + self.count

    @property
    def is_drawing(self) -> bool:
        """Whether the step draws the request's next token."""
        return self.end == len(self.request.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What to run: decode rows first."""

    rows: tuple[Row, ...]
    bucket: Bucket
    features: frozenset[str]
    """The variant of drawing."""
    admitted: tuple[Request, ...]
    """Those that took a slot since the step before."""


class Scheduler:
    """Continuous batching: decode rows first, then chunks of prompts, within the token budget of a step.

    `policy` is the plugin's, or a smaller one for a while after a step ran out of memory.
    """

    def __init__(
        self,
        shapes: ShapePolicy,
        capabilities: Capabilities,
        kv: KVCacheManager,
        *,
        num_slots: int,
        max_context: int,
    ) -> None:
        self.shapes = shapes
        self.policy = shapes.batch
        self.capabilities = capabilities
        self.kv = kv
        self.max_context = max_context
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.suspects = Suspects()
        self.num_preemptions = 0
        self._free_slots = list(reversed(range(num_slots)))
        self._admitted: list[Request] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to run."""
        return not self.waiting and not self.running

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest for what could never run, so that no step is ever stuck."""
        longest = request.max_tokens
        if longest + 1 > self.max_context:
            raise InvalidRequest(
                f"{request.num_prompt} prompt tokens and {request.max_new_tokens} new ones are more than "
                f"the {self.max_context} tokens served; ask for fewer"
            )
        if not self.kv.fits(longest):
            raise InvalidRequest(f"{longest} tokens are more than the KV cache holds")
        if not self.capabilities.chunked_prefill:
            self._check_whole_prefill(request)
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Forget a request wherever it is, and free what it holds."""
        self.suspects.forget([request])
        if request.slot is None:
            if request in self.waiting:
                self.waiting.remove(request)
            return
        self._release(request)
        request.leave()

    def schedule(self) -> Step | None:
        """The next step, or None when nothing can run."""
        rows = next(filter(None, map(self._compose, self.suspects.turns())), None)
        if rows is None:
            return None
        rows, bucket = self._fit(rows)
        admitted, self._admitted = tuple(self._admitted), []
        return Step(
            rows=tuple(rows),
            bucket=bucket,
            features=self._variant(rows),
            admitted=tuple(r for r in admitted if r.slot is not None),
        )

    def commit(self, step: Step, drawn: Sequence[int | None]) -> list[Request]:
        """Record what a step did; `drawn` holds a token per row that draws, in order (None: not a finite row).

        Returns the requests that drew or failed, in the same order.
        """
        tokens = iter(drawn)
        changed = []
        for row in step.rows:
            request = row.request
            if request.slot is None:
                if row.is_drawing:
                    next(tokens)
                continue
            token = next(tokens) if row.is_drawing else None
            has_failed = row.is_drawing and token is None
            assert request.table is not None
            request.advance(row.count)
            if has_failed:
                self.kv.discard(request.table)
                request.fail()
            else:
                self.kv.remember(request.table, request.tokens, request.num_computed)
            if token is not None:
                request.draw(token)
            elif not has_failed:
                continue
            changed.append(request)
            if request.finish_reason is not None:
                self._leave(request)
        self.suspects.acquit()
        return changed

    def blame(self, step: Step) -> Request | None:
        """`step` failed and changed nothing: the request at fault, which ends here, or None while that is not known."""
        culprit = self.suspects.blame({row.request: row.end for row in step.rows})
        if culprit is not None:
            self.fail(culprit)
        return culprit

    def fail(self, request: Request) -> None:
        """End a running request with an error; nobody finds what it computed."""
        assert request.table is not None
        self.kv.discard(request.table)
        request.fail()
        self._leave(request)

    def end_what_cannot_return(self) -> list[Request]:
        """End the running requests whose text has outgrown what a step can compute anew; those ended."""
        if self.capabilities.chunked_prefill:
            return []
        most = self.shapes.batch.max_tokens
        ended = [request for request in self.running if len(request.tokens) > most]
        for request in ended:
            self.fail(request)
        return ended

    def recompute_all(self) -> None:
        """The cache is lost: put every running request back, and forget what the blocks held."""
        while self.running:
            self._preempt(self.running[-1])
        self.kv.forget_all()

    def shrink(self, step: Step) -> None:
        """`step` ran out of memory: compose none of more than half its size."""
        policy, num_tokens = self.policy, sum(row.count for row in step.rows)
        # a prompt that must be computed in one step cannot be made to wait for a larger one
        may_cut = self.capabilities.chunked_prefill
        self.policy = replace(
            policy,
            max_rows=max(1, min(policy.max_rows, len(step.rows) // 2)),
            max_tokens=max(1, min(policy.max_tokens, num_tokens // 2))
            if may_cut
            else policy.max_tokens,
        )

    def relax(self) -> None:
        """Let steps be twice as large again, up to what the plugin allows."""
        most, policy = self.shapes.batch, self.policy
        self.policy = replace(
            policy,
            max_rows=min(most.max_rows, 2 * policy.max_rows),
            max_tokens=min(most.max_tokens, 2 * policy.max_tokens),
        )

    def preempt_youngest(self) -> None:
        """Put the youngest running request back; its text must not change by it."""
        if self.running:
            self._preempt(self.running[-1])

    def _compose(self, eligible: Eligible) -> list[Row]:
        policy = self.policy
        rows: list[Row] = []
        if policy.mixed:
            budget = self._add_decodes(rows, policy.max_tokens, eligible)
            self._add_prefills(rows, budget, eligible)
        else:
            self._add_prefills(rows, policy.max_tokens, eligible)
            if not rows:
                self._add_decodes(rows, policy.max_tokens, eligible)
        return rows

    def _add_decodes(self, rows: list[Row], budget: int, eligible: Eligible) -> int:
        """Append a decode row for each request that can have one; returns what is left of the budget."""
        for request in list(self.running):
            if budget == 0 or len(rows) == self.policy.max_rows:
                break
            if not request.is_decoding or not eligible(request):
                continue
            if self._grow(request, len(request.tokens), rows):
                rows.append(
                    Row(request=request, start=request.num_computed, count=1, is_decode=True)
                )
                budget -= 1
        return budget

    def _add_prefills(self, rows: list[Row], budget: int, eligible: Eligible) -> None:
        policy = self.policy
        limit = policy.max_rows
        if policy.max_prefills is not None:
            limit = min(limit, len(rows) + policy.max_prefills)
        preemptions = self.num_preemptions
        for request in list(self.running):
            if budget == 0 or len(rows) >= limit:
                return
            if request.slot is not None and not request.is_decoding and eligible(request):
                budget -= self._add_prefill(request, rows, budget)
        # whoever was put back in this step must not come in again by the same door
        while budget > 0 and len(rows) < limit and self.num_preemptions == preemptions:
            request_or_none = self._admit(budget, eligible)
            if request_or_none is None:
                return
            budget -= self._add_prefill(request_or_none, rows, budget)

    def _add_prefill(self, request: Request, rows: list[Row], budget: int) -> int:
        """Append a chunk of the request's text; returns its number of tokens, 0 when it has to wait."""
        left = len(request.tokens) - request.num_computed
        count = min(left, budget) if self.capabilities.chunked_prefill else left
        if count > budget or not self._grow(request, request.num_computed + count, rows):
            return 0
        rows.append(Row(request=request, start=request.num_computed, count=count, is_decode=False))
        return count

    def _admit(self, budget: int, eligible: Eligible) -> Request | None:
        """Give the longest waiting request a slot, if it can run to the end of its prompt."""
        if not self._free_slots or len(self.running) >= self.shapes.batch.max_rows:
            return None
        request = next(filter(eligible, self.waiting), None)
        if request is None:
            return None
        if not self.capabilities.chunked_prefill and len(request.tokens) > budget:
            return None
        table = self._open(request)
        if table is None:
            return None
        self.waiting.remove(request)
        request.admit(self._free_slots.pop(), table)
        self.kv.count_lookup(table, len(request.tokens))
        self.running.append(request)
        self._admitted.append(request)
        return request

    def _open(self, request: Request) -> BlockTable | None:
        """The cached part of the request's text, with room for the rest; None when there is none."""
        salt = request.salt
        table = self.kv.open(request.tokens, salt)
        if self.capabilities.preemption:
            # with nothing else running it may grow by taking all there is
            if not self.running or self.kv.can_reserve(table, len(request.tokens) + 1):
                return table
        elif self.kv.reserve(table, request.max_tokens):
            return table
        self.kv.close(table)
        return None

    def _grow(self, request: Request, num_tokens: int, rows: Sequence[Row]) -> bool:
        """Blocks for `num_tokens` of the request, by preemption if need be. False: it has to wait itself."""
        if request.slot is None:
            return False
        assert request.table is not None
        self.kv.trim(request.table, request.num_computed)
        busy = {row.request.id for row in rows}
        while not self.kv.reserve(request.table, num_tokens):
            assert self.capabilities.preemption, "the worst case was reserved at admission"
            victim = next(r for r in reversed(self.running) if r is request or r.id not in busy)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.preempt()
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _leave(self, request: Request) -> None:
        self._release(request)
        request.leave()
        self.suspects.forget([request])

    def _release(self, request: Request) -> None:
        assert request.table is not None
        assert request.slot is not None
        self.kv.close(request.table)
        self._free_slots.append(request.slot)
        self.running.remove(request)

    def _fit(self, rows: list[Row]) -> tuple[list[Row], Bucket]:
        """Make the step smaller until a bucket holds it."""
        while True:
            try:
                return rows, self.shapes.fit(self._shape(rows))
            except TooLarge as error:
                rows = self._shrink(rows, error)

    def _shrink(self, rows: list[Row], error: TooLarge) -> list[Row]:
        chunked, last = self.capabilities.chunked_prefill, rows[-1]
        if chunked and error.axis == "query" and error.limit > 0:
            return [replace(row, count=min(row.count, error.limit)) for row in rows]
        if chunked and error.axis == "tokens" and not last.is_decode:
            left = error.limit - sum(row.count for row in rows[:-1])
            if 0 < left < last.count:
                return [*rows[:-1], replace(last, count=left)]
        if len(rows) > 1:
            return rows[:-1]
        if chunked and last.count > 1:
            return [replace(last, count=last.count // 2)]
        raise error

    def _shape(self, rows: Sequence[Row]) -> BatchShape:
        kinds = {row.is_decode for row in rows}
        if len(kinds) == 2:
            phase = Phase.MIXED
        else:
            phase = Phase.DECODE if kinds == {True} else Phase.PREFILL
        tables = [row.request.table for row in rows]
        return BatchShape(
            phase=phase,
            num_rows=len(rows),
            num_tokens=sum(row.count for row in rows),
            num_logits=sum(row.is_drawing for row in rows),
            max_query=max(row.count for row in rows),
            max_context=max(row.end for row in rows),
            max_computed=max(row.start for row in rows),
            num_blocks=sum(-(-row.end // self.kv.block_size) for row in rows),
            max_block=max(max(blocks) for t in tables if t is not None for blocks in t.blocks),
        )

    def _variant(self, rows: Sequence[Row]) -> frozenset[str]:
        """The smallest declared set of features that holds what the rows need."""
        needed = frozenset[str]().union(*(row.request.features for row in rows if row.is_drawing))
        variants = self.shapes.draw_variants()
        if not variants:
            return needed
        return min((v for v in variants if needed <= v), key=len)

    def _check_whole_prefill(self, request: Request) -> None:
        longest = request.max_tokens if self.capabilities.preemption else request.num_prompt
        most = self.shapes.batch.max_tokens
        if longest > most:
            raise InvalidRequest(
                f"{longest} tokens are more than the {most} of a step, and this backend computes "
                "prompts in one; ask for fewer, or raise --max-batch-prefill-tokens"
            )
