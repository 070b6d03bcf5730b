"""RemoteExecutor: many workers in processes of their own, told the same at the same time.

Rank 0's output is taken. Where a step raises in all workers alike, it failed for what is in it and can be repeated;
where it raises in some, the others wait for them inside a collective, and the engine ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...backends.plugin import Launch
from ...backends.runtime import ErrorClass
from ...backends.step import StepBatch, StepOutput
from ..batch import BatchBuilder
from ..errors import WorkerDied
from ..failures import heard
from ..heartbeat import BEAT_S
from ..messages import Progress, StartFailed
from ..models.report import WeightReport
from .executor import Report, Reset
from .peers import Peers
from .wire import (
    Allocate,
    Answer,
    BlockBytes,
    Budget,
    Close,
    Counters,
    Drawn,
    Loaded,
    Message,
    Order,
    ReplaceLostCache,
    RunStep,
    StepFailed,
    WarmUp,
    WorkerLaunch,
    encode,
)


class StepRaised(Exception):
    """A step raised in the workers; `kind` is what it means there."""

    def __init__(self, kind: ErrorClass, message: str, traceback: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.add_note(traceback)


class RemoteExecutor:
    """See Executor. Made by `start`."""

    def __init__(self, peers: Peers, launch: Launch, keep: object = None) -> None:
        self.launch = launch
        self.builder = BatchBuilder(
            launch.model,
            launch.options,
            launch.shapes.batch,
            has_token_slots=launch.capabilities.overlapped_steps,
        )
        self.weights: Sequence[WeightReport] = ()
        self._peers = peers
        self._keep = keep
        self._is_sound = True
        """All workers wait for an order."""

    @classmethod
    def start(
        cls,
        peers: Peers,
        launch: Launch,
        told: Sequence[WorkerLaunch],
        report: Report,
        keep: object = None,
    ) -> RemoteExecutor:
        """Wait until all have loaded; `told` is by rank. Owns `peers`, and ends them if it raises.

        `keep` is what must live as long as they do: the store where they meet.
        """
        executor = cls(peers, launch, keep)
        try:
            executor._is_sound = False
            for rank, one in enumerate(told):
                peers.send(rank, encode(one))
            loaded = executor._answers(report)
            executor.weights = [one.weights for one in loaded if isinstance(one, Loaded)]
        except BaseException:
            executor.close()
            raise
        return executor

    def budget(self) -> int:
        """See Executor.budget."""
        return min(_number(value) for value in self._ask(Budget()))

    def block_bytes(self) -> list[int]:
        """See Executor.block_bytes. Parts have one size; where devices differ in padding, the largest counts."""
        by_rank = [value for value in self._ask(BlockBytes()) if isinstance(value, list)]
        return [max(of_group) for of_group in zip(*by_rank, strict=True)]

    def allocate(self, num_blocks: Sequence[int]) -> None:
        """See Executor.allocate."""
        self._ask(Allocate(list(num_blocks)))

    def warm_up(self, num_blocks: int, progress: Callable[[int, int], None]) -> None:
        """See Executor.warm_up. From its end on silence means death."""
        self._ask(WarmUp(num_blocks), lambda _, done, total, __: progress(done, total))
        self._peers.is_watching = True

    def step(self, batch: StepBatch, resets: Sequence[Reset] = ()) -> StepOutput | None:
        """See Executor.step. Raises StepRaised or WorkerDied."""
        self._tell(RunStep(batch, list(resets)))
        answers = self._answers()
        failed = [one for one in answers if isinstance(one, StepFailed)]
        if failed:
            is_alike = len(failed) == len(answers) and len({one.kind for one in failed}) == 1
            raise _raised(failed[0], failed[0].kind if is_alike else "unknown")
        return answers[0].output() if isinstance(answers[0], Drawn) else None

    def classify(self, error: Exception) -> ErrorClass:
        """See Executor.classify."""
        if isinstance(error, StepRaised):
            return error.kind
        return "device_lost" if isinstance(error, WorkerDied) else "unknown"

    def replace_lost_cache(self) -> bool:
        """See Executor.replace_lost_cache."""
        return any(self._ask(ReplaceLostCache()))

    def counters(self) -> dict[str, float]:
        """See Executor.counters."""
        summed: dict[str, float] = {}
        for value in self._ask(Counters()):
            for name, figure in value.items() if isinstance(value, dict) else ():
                summed[name] = summed.get(name, 0.0) + figure
        return summed

    def check(self) -> None:
        """See Executor.check."""
        self._is_sound = False
        for rank, message in self._peers.hear(0):
            raise WorkerDied(f"worker {rank} sent a {type(message).__name__} that nobody asked for")
        self._is_sound = True

    def close(self) -> None:
        """See Executor.close. Where one is lost or still at work, nobody is waited for."""
        if self._is_sound:
            try:
                self._tell(Close())
                self._is_sound = True
            except WorkerDied:
                pass  # then all are killed
        self._peers.close(quickly=not self._is_sound)

    def _ask(self, order: Order, progress: Report | None = None) -> list[object]:
        """What each rank answers."""
        self._tell(order)
        return [one.value for one in self._answers(progress) if isinstance(one, Answer)]

    def _tell(self, order: Order) -> None:
        self._is_sound = False
        self._peers.send_all(encode(order))

    def _answers(self, progress: Report | None = None) -> list[Message]:
        """One of each rank. Raises what a start raised, and where a worker cannot go on StepRaised or WorkerDied."""
        answers: dict[int, Message] = {}
        while len(answers) < len(self._peers):
            for rank, message in self._peers.hear(BEAT_S):
                match message:
                    case Progress(phase, done, total, unit):
                        if progress is not None and rank == 0:
                            progress(phase, done, total, unit)
                    case StartFailed():
                        raise heard(message)
                    case StepFailed(kind="device_lost" | "unknown"):
                        # the others may wait for it in vain
                        raise _raised(message, message.kind)
                    case _:
                        answers[rank] = message
        self._is_sound = True
        return [answers[rank] for rank in range(len(answers))]


def _raised(failed: StepFailed, kind: ErrorClass) -> StepRaised:
    return StepRaised(kind, f"{failed.error}: {failed.message}", failed.traceback)


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value
