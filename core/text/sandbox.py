"""The jinja environment that chat templates run in.

A template comes with a model, so it is a stranger's program. Jinja's sandbox gives it no attribute that leads out of
its values and no way to change them. What it can burn is bounded by a budget for each rendering: every loop turn,
call, filter and operator costs a step, large values cost more, and nothing may grow beyond a size. The wall limit is
CPU time of the thread, looked at between steps; no single step takes long, because sizes are checked before it.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_MAX_STEPS = 1_000_000
_MAX_CPU_S = 1.5
_MAX_CHARS = 1 << 24
"""Of any one text, and of all that is written together."""
_MAX_NUMBER = 1 << 24
"""Of an argument: it could be a width or a count."""
_LONG_NUMBER = re.compile(r"\d{7}")
"""In a format, where it would be a width."""
_STEPS_PER_CLOCK = 64
_ITEM_WEIGHT = 64
"""Characters that an item of a list counts for."""


class Exhausted(Exception):
    """A rendering wants more than it may have."""


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._steps = 0
        self._chars = 0
        self._end = time.thread_time() + _MAX_CPU_S
        self._weights: dict[int, tuple[int, object]] = {}
        """By id, with the object, which thereby keeps its id. Nothing in the sandbox can change one."""

    def step(self, *values: object) -> None:
        """Pay for one step on these values."""
        before = self._steps
        self._steps += 1 + sum(_cost(value) for value in values)
        if self._steps > _MAX_STEPS:
            raise Exhausted(f"takes more than {_MAX_STEPS} steps")
        if (
            self._steps // _STEPS_PER_CLOCK > before // _STEPS_PER_CLOCK
            and time.thread_time() > self._end
        ):
            raise Exhausted(f"takes more than {_MAX_CPU_S:g} s")

    def weigh(self, value: object) -> int:
        """About how long str(value) is: what a list holds twice counts twice. Pays for what was not weighed yet.

        [[[x, x], [x, x]], …] is built in a few steps, and comparing or writing it takes 2^depth.
        """
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, list | tuple | dict):
            return _ITEM_WEIGHT
        known = self._weights.get(id(value))
        if known is not None:
            return known[0]
        self.step(value)
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        weight = sum(map(self.weigh, items), _ITEM_WEIGHT)
        check_size(weight)
        self._weights[id(value)] = weight, value
        return weight

    def write(self, text: str) -> None:
        """Pay for text that is written."""
        self.step(text)
        self._chars += len(text)
        check_size(self._chars)


def check_size(num_chars: int) -> None:
    """Raise Exhausted for a text that is too long."""
    if num_chars > _MAX_CHARS:
        raise Exhausted(f"writes more than {_MAX_CHARS} characters")


def _cost(value: object) -> int:
    if isinstance(value, str):
        return len(value) // 256
    return (
        len(value) // 16
        if isinstance(value, Sized) and not isinstance(value, jinja2.Undefined)
        else 0
    )


def _flat_weight(value: str | list[object] | tuple[object, ...]) -> int:
    return len(value) if isinstance(value, str) else len(value) * _ITEM_WEIGHT


def _check_arguments(values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise Exhausted(f"counts to {value}")
        if isinstance(value, tuple):
            _check_arguments(value)


def _check_call(name: str, owner: object, arguments: tuple[object, ...]) -> None:
    """Refuse a method or filter of a text that would make something large of something small."""
    _check_arguments(arguments)
    if not isinstance(owner, str):
        return
    counts = [value for value in arguments if isinstance(value, int)]
    texts = [len(value) for value in arguments if isinstance(value, str)]
    match name:
        case "format" | "format_map" if _LONG_NUMBER.search(owner):
            raise Exhausted("formats with a width of millions")
        case "replace" | "translate" if max(texts, default=0) > 1:
            check_size((len(owner) + 1) * max(texts))
        case "join" if arguments and isinstance(arguments[0], list | tuple):
            check_size(sum(len(owner) + len(str(item)) for item in arguments[0]))
        case "expandtabs":
            check_size(owner.count("\t") * max(counts, default=8))
        case "indent":
            check_size((owner.count("\n") + 1) * max([*counts, *texts], default=4))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Transformers has it: no HTML escapes, other letters as they are."""
    if indent is not None and indent > 64:
        raise Exhausted(f"indents by {indent}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may name it
    return datetime.now().strftime(format)


class _Generation(Extension):
    """{% generation %} marks what the model wrote, for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """What namespace() makes; it can hold itself, so it does not write out what it holds."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Metering(NodeTransformer):
    """Sends loops, `~` and literals through the budget, which the environment cannot see otherwise."""

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        if isinstance(node, nodes.Tuple) and node.ctx != "load":
            return node  # the targets of an assignment
        return nodes.Filter(node, "_weighed", [], [], None, None, lineno=node.lineno)

    visit_Tuple = visit_Dict = visit_List

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_metered", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        items = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(items, "_joined", [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles templates; set `budget` around each rendering."""

    intercepted_binops = frozenset({"*", "**", "+", "%", "//", "/", "-"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # else constant expressions would run at compile time, outside any budget
            finalize=self._finalize,
            extensions=[loopcontrols, _Generation],
        )
        self.budget: ContextVar[Budget] = ContextVar("budget")
        self.filters = {name: self._charged(name, call) for name, call in self.filters.items()}
        self.filters |= {
            "_metered": self._metered,
            "_joined": self._joined,
            "_weighed": self._weighed,
        }
        self.filters["tojson"] = self._charged("tojson", _tojson)
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Metering().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]

    def call(self, context: Context, obj: object, *args: object, **kwargs: object) -> object:
        """Every call in a template comes through here."""
        # Jinja wraps str.format; what is wrapped knows the text.
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        _check_call(getattr(obj, "__name__", ""), owner, (*args, *kwargs.values()))
        result = super().call(context, obj, *args, **kwargs)
        self.budget.get().step(owner, result)
        return self._weighed(result)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """Operators that can make something large of something small."""
        self.budget.get().step(left, right)
        match operator, left, right:
            case "*", str() | list() | tuple(), int(count):
                check_size(_flat_weight(left) * count)
            case "*", int(count), str() | list() | tuple():
                check_size(_flat_weight(right) * count)
            case "+", str() | list() | tuple(), str() | list() | tuple():
                check_size(_flat_weight(left) + _flat_weight(right))
            case "%", str(), _:
                _check_call("format", left, (right,))
            case "*" | "**", _, _:
                _check_arguments((left, right))
                if operator == "**" and isinstance(right, int | float) and abs(right) > 64:
                    raise Exhausted(f"raises to the power of {right}")
        return self._weighed(super().call_binop(context, operator, left, right))

    def _charged(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        """A filter that pays for what it is given and what it makes."""

        takes_context = hasattr(call, "jinja_pass_arg")

        @functools.wraps(call)
        def charged(*args: object, **kwargs: object) -> object:
            values = (*(args[1:] if takes_context else args), *kwargs.values())
            if name == "join":
                separator = next((value for value in values[1:] if isinstance(value, str)), "")
                _check_call(name, separator, values[:1])
            else:
                _check_call(name, values[0] if values else None, values[1:])
            result = call(*args, **kwargs)
            self.budget.get().step(*values, result)
            return self._weighed(result)

        return charged

    def _metered(self, values: Iterable[object]) -> Iterator[object]:
        budget = self.budget.get()
        for value in values:
            budget.step()
            yield value

    def _weighed(self, value: object) -> object:
        self.budget.get().weigh(value)
        return value

    def _joined(self, values: list[object]) -> str:
        check_size(sum(map(self.budget.get().weigh, values)))
        texts = [str(value) for value in values]
        self.budget.get().step(*texts)
        return "".join(texts)

    def _finalize(self, value: object) -> str:
        text = str(self._weighed(value))
        self.budget.get().write(text)
        return text
