"""A recorded step holds device operations and nothing else, and gives what its function gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from chipset.plugins.sim import device, watch
from chipset.plugins.sim.rules import RuleBroken
from chipset.plugins.sim.tape import record


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    device.load()
    with torch.inference_mode(), watch.rule("int64", False):
        yield


def put(*values: float) -> Tensor:
    return torch.tensor(values).to("sim")


def host(tensor: Tensor) -> list[float]:
    with watch.reading():
        found: list[float] = tensor.cpu().tolist()
    return found


def test_a_replay_gives_what_the_function_gives_of_other_inputs() -> None:
    weight = put(2, 3, 4)

    def function(x: Tensor, more: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        best, order = (x * weight).sort()
        chosen = torch.cat((best, more["y"])).index_select(0, order.to(torch.int32))
        return chosen, {"sum": (x + more["y"]).sum(0, keepdim=True)}

    tape, made = record("f", function, [weight], (put(3, 2, 1), {"y": put(1, 1, 1)}))
    assert host(made[0]) == host(function(put(3, 2, 1), {"y": put(1, 1, 1)})[0])
    args = (put(0, 5, -1), {"y": put(7, 8, 9)})
    wanted = function(*args)
    found = tape.replay([weight, args[0], args[1]["y"]])
    assert host(found[0]) == host(wanted[0])
    assert host(found[1]["sum"]) == host(wanted[1]["sum"])


def test_a_replay_writes_to_the_tensors_it_is_given() -> None:
    def function(pages: Tensor, x: Tensor) -> Tensor:
        pages[:2].copy_(x)
        return pages

    tape, _ = record("f", function, [], (put(0, 0, 0), put(1, 2)))
    pages = put(0, 0, 9)
    assert tape.replay([pages, put(3, 4)]) is pages
    assert host(pages) == [3, 4, 9]


def test_a_replay_holds_no_tensor_longer_than_it_needs_it() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(20):
            x = x + 1
        return x

    big = torch.zeros(1 << 18).to("sim")
    tape, _ = record("f", function, [], (big,))
    device.reset_peak_memory_stats()
    before = device.memory_allocated()
    tape.replay([big])
    assert device.max_memory_allocated() - before <= 3 * big.nbytes


OUTSIDE = {"device": lambda: put(1, 2, 3), "host": lambda: torch.tensor([1.0, 2.0, 3.0])}


@pytest.mark.parametrize("where", OUTSIDE)
def test_a_tensor_that_is_no_argument_and_no_weight_is_refused(where: str) -> None:
    outside = OUTSIDE[where]()
    with pytest.raises(RuleBroken, match="no argument, no weight"):
        record("f", lambda x: x + outside, [], (put(1, 1, 1),))


def test_a_constant_made_of_host_values_is_refused() -> None:
    with pytest.raises(RuleBroken, match="recorded steps"):
        record("f", lambda x: x + torch.tensor([1.0, 2.0]).to("sim"), [], (put(1, 1),))


def test_a_result_that_is_no_part_of_the_step_is_refused() -> None:
    outside = put(1, 2)
    with pytest.raises(RuleBroken, match="as its result"):
        record("f", lambda x: outside, [], (put(1),))


LOOKING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "branch": lambda x: x if x.sum() > 0 else -x,
    "nonzero": lambda x: torch.nonzero(x),
    "mask": lambda x: x[x > 0],
    "tolist": lambda x: x.tolist(),
}


@pytest.mark.parametrize("look", LOOKING)
def test_python_that_looks_at_values_is_refused(look: str) -> None:
    with pytest.raises((RuleBroken, torch.AcceleratorError)):
        record("f", lambda x: (LOOKING[look](x), x)[1], [], (put(1, 2),))


def test_numbers_and_shapes_may_steer_the_program() -> None:
    tape, _ = record("f", lambda x: x * 2 if x.shape[0] > 1 else x, [], (put(1, 2),))
    assert host(tape.replay([put(3, 4)])) == [6, 8]
