"""A step as the list of device operations that it ran: what a graph is here.

Recording runs the step once for real; replaying runs the same operations on other inputs, without the Python that
called them. So whatever that Python decided is part of the graph, as on the devices simulated here, and what it may not
depend on is refused while recording.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .rules import RuleBroken

RULE = "recorded steps"
READING = frozenset((torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape))


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for a tensor in the arguments of an operation."""

    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One call of an operator."""

    function: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[int | None, ...]
    is_single: bool
    """Whether it returns a tensor rather than a sequence of them."""


class Tape:
    """Replays operations. Slots 0 .. num_inputs - 1 are the inputs."""

    def __init__(
        self, operations: Sequence[Operation], num_slots: int, outputs: Sequence[int], tree: Any
    ) -> None:
        self._operations = operations
        self._num_slots = num_slots
        self._outputs = outputs
        self._tree = tree
        self._dead = _last_uses(operations, keep=frozenset(outputs))

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """What the recorded function returned, of other inputs of the same shapes."""
        held: list[Any] = [None] * self._num_slots
        held[: len(inputs)] = inputs
        for operation, dead in zip(self._operations, self._dead, strict=True):
            args = [_filled(argument, held) for argument in operation.args]
            kwargs = {name: _filled(value, held) for name, value in operation.kwargs.items()}
            result = operation.function(*args, **kwargs)
            results = (result,) if operation.is_single else result
            for slot, value in zip(operation.results, results, strict=True):
                if slot is not None:
                    held[slot] = value
            for slot in dead:
                held[slot] = None
        return pytree.tree_unflatten([held[slot] for slot in self._outputs], self._tree)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what runs inside of it. Raises RuleBroken where a graph could not hold that."""

    def __init__(self, name: str, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name = name
        self._slots = WeakTensorKeyDictionary()
        self._num_slots = 0
        self._operations: list[Operation] = []
        for leaf in inputs:
            self._give_slot(leaf)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if READING.intersection(func.tags):
            raise RuleBroken(RULE, f"{self._name} asks for values on the device ({func})")
        kwargs = kwargs or {}
        held = tuple(self._held(func, argument) for argument in args)
        held_kwargs = {name: self._held(func, value) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        is_single = not isinstance(result, tuple | list)
        results = tuple(
            self._give_slot(value) if isinstance(value, Tensor) else None
            for value in ((result,) if is_single else result)
        )
        operation = Operation(
            function=func, args=held, kwargs=held_kwargs, results=results, is_single=is_single
        )
        self._operations.append(operation)
        return result

    def finish(self, made: Any) -> Tape:
        """The tape, which returns what `made` is."""
        leaves, tree = pytree.tree_flatten(made)
        outputs = [self._slot(None, leaf) for leaf in leaves]
        return Tape(self._operations, self._num_slots, outputs, tree)

    def _give_slot(self, tensor: Tensor) -> int:
        self._slots[tensor] = self._num_slots
        self._num_slots += 1
        return self._num_slots - 1

    def _held(self, func: OpOverload, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return Slot(self._slot(func, argument))
        if isinstance(argument, tuple | list):
            return [self._held(func, part) for part in argument]
        return argument

    def _slot(self, func: OpOverload | None, tensor: Tensor) -> int:
        slot: int | None = self._slots.get(tensor)  # type: ignore[no-untyped-call]
        if slot is None:
            where = "as its result" if func is None else f"in {func}"
            raise RuleBroken(
                RULE,
                f"{self._name} uses a {tensor.device.type} tensor {list(tensor.shape)} {where} that is no argument, "
                "no weight and made by no operation",
            )
        return slot


def record(
    name: str, function: Callable[..., Any], weights: Sequence[Tensor], args: Any
) -> tuple[Tape, Any]:
    """Run function(*args): its tape, over weights and then the leaves of args, and what it returned."""
    recorder = Recorder(name, [*weights, *pytree.tree_leaves(args)])
    with recorder:
        made = function(*args)
    return recorder.finish(made), made


def _filled(argument: Any, held: Sequence[Any]) -> Any:
    if type(argument) is Slot:
        return held[argument.index]
    if type(argument) is list:
        return [_filled(part, held) for part in argument]
    return argument


def _last_uses(operations: Sequence[Operation], keep: frozenset[int]) -> list[tuple[int, ...]]:
    """After each operation, the slots that nothing later reads."""
    seen, dead = set(keep), []
    for operation in reversed(operations):
        named = {slot for slot in operation.results if slot is not None}
        for argument in (*operation.args, *operation.kwargs.values()):
            named.update(_slots_of(argument))
        dead.append(tuple(named - seen))
        seen |= named
    return dead[::-1]


def _slots_of(argument: Any) -> set[int]:
    if type(argument) is Slot:
        return {argument.index}
    if type(argument) is list:
        return set[int]().union(*map(_slots_of, argument))
    return set()
