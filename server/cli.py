"""The command `chipset`: serve, run, pull, ls, rm, doctor, matrix, version.

Its head imports little, so that --help answers at once; each command imports what it needs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .. import __version__
from ..backends.errors import ChipsetError
from ..core.nodes import Nodes
from .parser import CommandLine, UsageError, meant, read_settings

if TYPE_CHECKING:
    from ..core.messages import Ready

T = TypeVar("T")

EXIT_BUG = 1
EXIT_NOTHING_SERVES = 1
EXIT_NOT_CONFORMING = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def _in_loop(work: Coroutine[Any, Any, T]) -> T:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _serve(arguments: argparse.Namespace) -> None:
    settings = read_settings(arguments, os.environ)
    nodes = Nodes.read(os.environ)
    if nodes is not None and nodes.rank > 0:
        # rank 0 serves, and this one works for its engine
        command = [sys.executable, "-P", "-m", "chipset.core.node_process"]
        os.execv(sys.executable, command)  # noqa: S606 - our own interpreter
    _check_backend(settings.backend)
    from .console import Console
    from .engine_process import COMMAND
    from .serving import serve

    console = Console()
    try:
        _in_loop(serve(settings, console, arguments.engine_command or COMMAND))
    finally:
        console.end_progress()


def _run(arguments: argparse.Namespace) -> None:
    settings = read_settings(arguments, os.environ)
    _check_backend(settings.backend)
    from .chat import ChatOptions, chat
    from .engine_process import COMMAND

    options = ChatOptions(
        prompt=arguments.prompt,
        system=arguments.system,
        temperature=arguments.temperature,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
    )
    _in_loop(chat(settings, options, arguments.engine_command or COMMAND))


def _pull(arguments: argparse.Namespace) -> None:
    settings = read_settings(arguments, os.environ)
    from ..core.loading.resolve import find_model
    from .background import in_background
    from .console import Console

    console = Console()

    async def pull() -> None:
        files = await in_background(
            lambda: find_model(
                settings.model,
                revision=settings.revision,
                refresh=True,
                progress=console.progress,
            )
        )
        console.end_progress()
        print(f"{files.name} is here: {files.weights[0].parent}")

    try:
        _in_loop(pull())
    finally:
        console.end_progress()


def _ls(_: argparse.Namespace) -> None:
    from ..core.loading.cache import Cache
    from ..core.loading.entries import list_entries
    from .console import human_bytes

    entries = list_entries(Cache.default())
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        print(f"{entry.name:{width}}  {human_bytes(entry.num_bytes):>10}  {entry.paths[0]}")


def _rm(arguments: argparse.Namespace) -> None:
    from ..core.loading.cache import Cache
    from ..core.loading.entries import remove_entry
    from .console import human_bytes

    freed = remove_entry(Cache.default(), arguments.name)
    print(f"removed {arguments.name}, {human_bytes(freed)}")


def _doctor(arguments: argparse.Namespace) -> int:
    from ..backends.registry import Registry
    from ..core.loading.cache import Cache
    from .doctor import diagnose

    found = diagnose(Registry.discover(), Cache.default())
    failure: ChipsetError | None = None
    if arguments.model is not None:
        try:
            found = replace(found, model=_weigh(arguments))
        except ChipsetError as error:
            failure = error
    _page(found.as_json() if arguments.json else found.as_text(_width()))
    if failure is not None:
        raise failure
    return 0 if found.can_serve else EXIT_NOTHING_SERVES


def _weigh(arguments: argparse.Namespace) -> Ready:
    settings = read_settings(arguments, os.environ)
    _check_backend(settings.backend)
    from .console import Console
    from .engine_process import COMMAND
    from .weighing import weigh

    console = Console()
    try:
        return _in_loop(weigh(settings, console, arguments.engine_command or COMMAND))
    finally:
        console.end_progress()


def _matrix(arguments: argparse.Namespace) -> None:
    from .matrix import render

    _page(render(arguments.backend, arguments.format, _width()))


def _conformance(arguments: argparse.Namespace) -> int:
    from ..core.conformance.report import check_backend, write_report

    outcome = check_backend(arguments.backend, quick=arguments.quick)
    if arguments.report is not None:
        command = f"chipset conformance --backend {arguments.backend}"
        path = write_report(
            outcome, arguments.backend, command + (" --quick" * arguments.quick), arguments.report
        )
        print(f"report: {path}", file=sys.stderr)
    return EXIT_NOT_CONFORMING if outcome.failed else 0


def _page(text: str) -> None:
    """Print something long, of which whoever reads may have seen enough before its end, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _width() -> int | None:
    """Of the terminal; None where output goes elsewhere, whose lines nobody wraps."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _version(_: argparse.Namespace) -> None:
    print(f"chipset {__version__}")


def _check_backend(name: str) -> None:
    """A backend that is not there is told before anything is loaded. Raises UsageError, BackendUnavailable."""
    from ..backends.options import BACKENDS
    from ..backends.registry import Registry

    if name == "auto":
        return
    registry = Registry.discover()
    choices = sorted({"auto", *BACKENDS, *registry.names, *registry.excluded})
    if name not in choices:
        known = ", ".join(choices)
        raise UsageError(f"--backend: not {name!r}{meant(name, choices)}; give one of {known}")
    # raises with the reason; what its probe finds is the engine process's affair
    registry.load(name)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int | None]] = {
    "serve": _serve,
    "run": _run,
    "pull": _pull,
    "ls": _ls,
    "rm": _rm,
    "doctor": _doctor,
    "matrix": _matrix,
    "conformance": _conformance,
    "version": _version,
}


def main(
    argv: Sequence[str] | None = None, engine_command: Sequence[str] | None = None
) -> NoReturn:
    """Run one command and end with its exit code (docs/serving.md lists them).

    `engine_command` starts another engine than this installation's.
    """
    given = sys.argv[1:] if argv is None else argv
    debug = "--debug" in given or os.environ.get("CHIPSET_DEBUG", "") not in ("", "0", "false")
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        arguments = CommandLine().parse(given)
        arguments.engine_command = engine_command
        code = COMMANDS[arguments.command](arguments) or 0
    except SystemExit as error:  # argparse's --help
        code = error.code if isinstance(error.code, int) else EXIT_BUG
    except UsageError as error:
        code = _report(error, EXIT_USAGE, debug=debug)
    except ChipsetError as error:
        code = _report(error, error.exit_code, debug=debug)
    except KeyboardInterrupt:
        # a server that is told to end does as it is told, however early
        code = 0 if given[:1] == ["serve"] else EXIT_INTERRUPTED
    except Exception as error:  # a bug: one line for the user, all of it for who asks
        bug = RuntimeError(f"{type(error).__name__}: {error}; a bug: see --debug for its traceback")
        code = _report(error if debug else bug, EXIT_BUG, debug=debug)
    _end(code)


def _report(error: Exception, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    line = " ".join(str(error).split()) or type(error).__name__
    print(f"chipset: error: {line}", file=sys.stderr)
    return code


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _end(code: int) -> NoReturn:
    """What still runs in the background (a download that was given up) is not waited for."""
    for one in (signal.SIGINT, signal.SIGTERM):
        # it is ending already
        signal.signal(one, signal.SIG_IGN)
    if "chipset.server.background" in sys.modules:
        from .background import is_busy, leave

        if is_busy():
            leave(code)
    sys.exit(code)
