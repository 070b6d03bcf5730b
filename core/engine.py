"""Engine: the loop of schedule, run, commit, emit, over the requests of one model."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from ..backends.plugin import Plugin
from ..backends.step import StepOutput
from .errors import InvalidRequest
from .executors.executor import Executor
from .messages import Ready, Stats, Submit, Token, Tokens
from .request import FinishReason, Request
from .scheduler import Scheduler, Step

RELAX_STEPS = 128
"""Steps after which those that follow may be larger again."""
NOT_FINITE = "the model gave logits that are not finite for this text"

_log = logging.getLogger(__name__)


class Engine:
    """Requests in, tokens out. One thread drives it; it knows no clock and no sockets."""

    def __init__(
        self,
        plugin: Plugin,
        runner: Executor,
        scheduler: Scheduler,
        ready: Ready,
        *,
        preempt_every: int = 0,
    ) -> None:
        self.plugin = plugin
        self.runner = runner
        self.scheduler = scheduler
        self.ready = ready
        self.preempt_every = preempt_every
        self._requests: dict[int, Request] = {}
        self._reported: set[int] = set()
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_cancelled = 0
        self._num_errors = 0
        self._num_failed_steps = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to run."""
        return self.scheduler.is_idle

    def submit(self, submit: Submit) -> None:
        """Queue a request. Raises InvalidRequest, naming what is wrong and what is served."""
        self._check(submit)
        room = self.ready.max_context - len(submit.prompt)
        wanted = submit.max_new_tokens
        request = Request.from_submit(submit, max_new_tokens=room if wanted is None else wanted)
        if request.sampling.temperature > 0 and request.sampling.seed is None:
            request.sampling = replace(request.sampling, seed=secrets.randbits(63))
        self.scheduler.add(request)
        self._requests[request.id] = request

    def cancel(self, request_ids: Iterable[int]) -> None:
        """Free what these requests hold; unknown ids are ignored, for they may just have finished."""
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None:
                self.scheduler.cancel(request)
                self._reported.discard(request_id)
                self._num_cancelled += 1

    def step(self) -> list[Tokens]:
        """Run one step; what it drew, per request.

        A step that raises is repeated in halves until the request at fault stands alone, and ends that one; raises what
        the backend cannot explain.
        """
        if self._num_steps % RELAX_STEPS == 0:
            self.scheduler.relax()
        if self.preempt_every and self._num_steps % self.preempt_every == self.preempt_every - 1:
            self.scheduler.preempt_youngest()
        step = self.scheduler.schedule()
        self._num_steps += 1
        if step is None:
            return []
        try:
            output = self._run(step)
        except Exception as error:  # a backend may raise anything at all; it says what it means
            return self._recover(step, error)
        num_drawing = sum(row.is_drawing for row in step.rows)
        self._num_prompt_tokens += sum(row.count for row in step.rows if not row.is_decode)
        drawn: list[int | None] = []
        if output is not None:
            ids, finite = np.asarray(output.ids), np.asarray(output.finite)
            drawn = [
                token if is_finite else None
                for token, is_finite in zip(
                    ids[:num_drawing].tolist(), finite[:num_drawing].tolist(), strict=True
                )
            ]
        drawing = [row.request for row in step.rows if row.is_drawing]
        self.scheduler.commit(step, drawn)
        return [
            self._report(request, index, output)
            for index, request in enumerate(drawing)
            if output is not None
        ]

    def stats(self) -> Stats:
        """Gauges and counters as they are now."""
        kv, scheduler = self.scheduler.kv, self.scheduler
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_total=sum(pool.num_total for pool in kv.pools),
            blocks_free=kv.num_free,
            blocks_held=kv.num_held,
            steps=self._num_steps,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=self._num_prompt_tokens,
            generated_tokens=self._num_generated_tokens,
            prefix_queries=kv.num_queried_tokens,
            prefix_hits=kv.num_hit_tokens,
            cancelled=self._num_cancelled,
            errors=self._num_errors,
            failed_steps=self._num_failed_steps,
            backend=self.runner.counters(),
        )

    def check(self) -> None:
        """Assert the KV manager's invariants against the requests that run."""
        tables = [r.table for r in self.scheduler.running if r.table is not None]
        self.scheduler.kv.check(tables)

    def close(self) -> None:
        """Leave the devices."""
        self.runner.close()

    def _check(self, submit: Submit) -> None:
        vocab_size = self.runner.launch.model.vocab_size
        if submit.request_id in self._requests:
            raise InvalidRequest(f"request {submit.request_id} is already running")
        if not submit.prompt:
            raise InvalidRequest("the prompt has no tokens; send some text")
        if not all(0 <= token < vocab_size for token in submit.prompt):
            raise InvalidRequest(f"a prompt token is outside the vocabulary of {vocab_size}")
        for what, ids in (("logit_bias", submit.sampling.logit_bias), ("stop", submit.stop_ids)):
            if not all(0 <= token < vocab_size for token in ids):
                raise InvalidRequest(f"a {what} token is outside the vocabulary of {vocab_size}")
        if len(submit.prompt) >= self.ready.max_context:
            raise InvalidRequest(
                f"{len(submit.prompt)} prompt tokens leave no room for new ones in the "
                f"{self.ready.max_context} tokens served; send a shorter prompt"
            )
        if submit.max_new_tokens is not None and submit.max_new_tokens < 1:
            raise InvalidRequest("max_new_tokens must be at least 1")
        if submit.min_new_tokens and not submit.ignore_eos:
            room = self.ready.max_logit_bias - len(submit.sampling.logit_bias)
            if len(submit.stop_ids) > room:
                raise InvalidRequest(
                    f"min_tokens with {len(submit.stop_ids)} stop ids and "
                    f"{len(submit.sampling.logit_bias)} biases needs more than the "
                    f"{self.ready.max_logit_bias} biases served"
                )
        launch = self.runner.launch
        suppressing = submit.min_new_tokens and not submit.ignore_eos and submit.stop_ids
        features = frozenset({"bias"} if suppressing else ())
        reason = self.plugin.check_request(
            submit.sampling, features, launch.options, launch.capabilities
        )
        if reason is not None:
            raise InvalidRequest(reason)

    def _run(self, step: Step) -> StepOutput | None:
        builder = self.runner.builder
        resets = [
            (request.slot, builder.counts(request))
            for request in step.admitted
            if request.slot is not None
        ]
        # a step that failed may have counted what it drew
        resets += [
            (row.request.slot, builder.counts(row.request))
            for row in step.rows
            if row.request in self.scheduler.suspects and row.request.slot is not None
        ]
        return self.runner.step(builder.build(step.rows, step.bucket, step.features), resets)

    def _recover(self, step: Step, error: Exception) -> list[Tokens]:
        """End the request at fault, once it is known, and leave the others as they were before the step."""
        kind = self.runner.classify(error)
        if kind in ("device_lost", "unknown"):
            raise error
        self._num_failed_steps += 1
        scheduler = self.scheduler
        if kind == "out_of_memory":
            scheduler.shrink(step)
        at_fault = scheduler.blame(step)
        # the traceback once, where it ends: halving repeats it
        _log.warning(
            "a step of %d requests failed (%s): %s: %s",
            len(step.rows),
            kind,
            type(error).__name__,
            error,
            exc_info=None if at_fault is None else error,
        )
        ended = [] if at_fault is None else [at_fault]
        if self.runner.replace_lost_cache():
            ended += scheduler.end_what_cannot_return()
            scheduler.recompute_all()
        return [self._end(request, error) for request in ended]

    def _end(self, request: Request, error: Exception) -> Tokens:
        self._requests.pop(request.id, None)
        self._reported.discard(request.id)
        self._num_errors += 1
        return Tokens(
            request_id=request.id,
            tokens=[],
            finish_reason=FinishReason.ERROR,
            error=f"a step failed for this request ({type(error).__name__}); the server's log has more",
        )

    def _report(self, request: Request, index: int, output: StepOutput) -> Tokens:
        reason = request.finish_reason
        first = request.id not in self._reported
        self._reported.add(request.id)
        if reason is not None:
            self._requests.pop(request.id, None)
            self._reported.discard(request.id)
        if reason is FinishReason.ERROR:
            self._num_errors += 1
            return Tokens(request_id=request.id, tokens=[], finish_reason=reason, error=NOT_FINITE)
        self._num_generated_tokens += 1
        return Tokens(
            request_id=request.id,
            tokens=[_token(request, index, output)],
            finish_reason=None if reason is None else str(reason),
            cached_tokens=request.num_cached if first else 0,
        )


def _token(request: Request, index: int, output: StepOutput) -> Token:
    token, wanted = request.tokens[-1], request.sampling.num_logprobs
    if wanted is None or output.logprob is None:
        return Token(id=token)
    assert output.rank is not None
    assert output.top_ids is not None
    assert output.top_logprobs is not None
    return Token(
        id=token,
        logprob=float(output.logprob[index]),
        rank=int(output.rank[index]),
        top_ids=output.top_ids[index, :wanted].tolist(),
        top_logprobs=output.top_logprobs[index, :wanted].tolist(),
    )
