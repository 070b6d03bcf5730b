"""The worker's end of a link: orders in, answers out, one runner between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ...backends.registry import Registry
from ..failures import told
from ..files import ModelFiles
from ..heartbeat import Heartbeat
from ..loading.resolve import find_model
from ..models.families import load_config
from ..progress import ProgressReport
from ..worker import load_runner, scheme_of
from .executor import Executor
from .link import Link, LinkBroken
from .wire import (
    Allocate,
    Answer,
    Beat,
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
    decode_launch,
    decode_order,
    encode,
)


def serve(link: Link, load: Callable[[Link], Executor] | None = None) -> int:
    """Until Close. Exit code 0, or that of the error that the start failed with. Raises LinkBroken.

    `load` makes the runner of the launch that comes first over the link; None: this installation's.
    """
    heartbeat = Heartbeat(lambda: _beat(link))
    try:
        return _serve(link, load or _load)
    finally:
        heartbeat.close()


def _serve(link: Link, load: Callable[[Link], Executor]) -> int:
    try:
        runner = load(link)
    except LinkBroken:
        raise
    except Exception as error:  # whatever it is, the engine must hear of it
        failed = told(error)
        link.send(encode(failed))
        return failed.exit_code
    try:
        link.send(encode(Loaded(*runner.weights)))
        while not isinstance(order := decode_order(link.receive()), Close):
            link.send(encode(_obey(order, runner, link)))
    finally:
        runner.close()
    return 0


def _load(link: Link) -> Executor:
    launch = decode_launch(link.receive())
    files = _here(launch.files)
    registry = Registry.discover()
    plugin = registry.load(launch.plugin)
    scheme = scheme_of(files, launch.quantize, registry.formats(launch.plugin))
    config = load_config(files.config)
    report = _progress(link)
    return load_runner(launch.launch(plugin), plugin, config, files, scheme, report)


def _here(files: ModelFiles) -> ModelFiles:
    """The same model on this host, which may keep it elsewhere, or not have it yet."""
    if all(path.exists() for path in (files.config, *files.weights)):
        return files
    return find_model(files.source, revision=files.revision)


def _obey(order: Order, runner: Executor, link: Link) -> Message:
    if isinstance(order, RunStep):
        return _run(order, runner)
    try:
        return Answer(_value(order, runner, link))
    except LinkBroken:
        raise
    except Exception as error:  # whatever it is, the engine must hear of it
        return told(error)


def _run(order: RunStep, runner: Executor) -> Message:
    try:
        output = runner.step(order.batch, order.resets)
    except Exception as error:  # a backend may raise anything at all; it says what it means
        failed = told(error)
        return StepFailed(
            kind=runner.classify(error),
            error=failed.error,
            message=failed.message,
            traceback=failed.traceback,
        )
    # all ranks draw the same; one tells
    is_first = runner.launch.worker.rank == 0
    return Drawn.of(output) if output is not None and is_first else Answer()


def _value(
    order: Order, runner: Executor, link: Link
) -> bool | int | list[int] | dict[str, float] | None:
    match order:
        case Budget():
            return runner.budget()
        case BlockBytes():
            return runner.block_bytes()
        case Allocate(num_blocks):
            runner.allocate(num_blocks)
        case WarmUp(num_blocks):
            report = _progress(link)
            runner.warm_up(num_blocks, lambda done, total: report("warm-up", done, total, ""))
        case ReplaceLostCache():
            return runner.replace_lost_cache()
        case Counters():
            return runner.counters()
    return None


def _progress(link: Link) -> ProgressReport:
    return ProgressReport(lambda progress: link.send(encode(progress)))


def _beat(link: Link) -> None:
    # an engine that is gone is noticed elsewhere
    with contextlib.suppress(LinkBroken):
        link.send(encode(Beat()))
