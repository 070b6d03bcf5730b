"""What the emulated device refuses, lets pass and counts."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chipset.plugins.sim import device, watch
from chipset.plugins.sim.watch import DeviceCounts, Rule

INFINITY = float("inf")


@dataclass(frozen=True, kw_only=True)
class Given:
    """On the device, but for `host`."""

    x: Tensor
    """[3, 4] f32"""
    ids: Tensor
    """[3] i32: 0, 1, 2"""
    host: Tensor
    """[3, 4] f32"""


@pytest.fixture(autouse=True, scope="module")
def _loaded() -> None:
    device.load()


@pytest.fixture
def given() -> Given:
    host = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
    ids = torch.tensor([0, 1, 2], dtype=torch.int32)
    return Given(x=host.to("sim"), ids=ids.to("sim"), host=host)


@pytest.fixture
def infinity_forbidden() -> Iterator[None]:
    with watch.rule("infinity", True):
        yield


def counted(act: Callable[[], object]) -> DeviceCounts:
    before = watch.counts()
    act()
    return watch.counts() - before


def refused(act: Callable[[], object]) -> dict[str, int]:
    def attempt() -> None:
        with pytest.raises(torch.AcceleratorError, match="sim device refuses: "):
            act()

    return dict(counted(attempt).refused)


REFUSED: dict[str, tuple[str, Callable[[Given], object]]] = {
    "item": ("read", lambda g: g.x.sum().item()),
    "tolist": ("read", lambda g: g.x.tolist()),
    "cpu": ("read", lambda g: g.x.cpu()),
    "cpu without blocking": ("read", lambda g: g.x.to("cpu", non_blocking=True)),
    "cpu of .data": ("read", lambda g: g.x.data.cpu()),
    "bool": ("read", lambda g: bool(g.x.sum())),
    "if any": ("read", lambda g: 1 if (g.x > 0).any() else 0),
    "int": ("read", lambda g: int(g.x[0, 0])),
    "float": ("read", lambda g: [float(v) for v in g.ids]),
    "range": ("read", lambda g: range(g.ids[0])),  # type: ignore[call-overload]
    "a device number as index": ("read", lambda g: g.x[g.ids[0]]),
    "a device number as bound": ("read", lambda g: g.x[: g.ids[0]]),
    "full": ("read", lambda g: torch.full((2,), g.x[0, 0], device="sim")),  # type: ignore[call-overload]
    "zeros": ("read", lambda g: torch.zeros(g.ids[0])),  # type: ignore[call-overload]
    "arange": ("read", lambda g: torch.arange(g.ids[0])),  # type: ignore[call-overload]
    "view": ("read", lambda g: g.x.view(g.ids[2], -1)),  # type: ignore[call-overload]
    "pad": ("read", lambda g: F.pad(g.x, (g.ids[0], 0))),  # type: ignore[list-item]
    "format": ("read", lambda g: f"{g.x[0, 0]}"),
    "contains": ("read", lambda g: 3.0 in g.x),
    "sorted": ("read", lambda g: sorted(g.x[0])),
    "allclose": ("read", lambda g: torch.allclose(g.x, g.x)),
    "tensor of numbers": ("read", lambda g: torch.tensor([g.x[0, 0], g.x[0, 1]])),
    "as_tensor": ("read", lambda g: torch.as_tensor(g.x, device="cpu")),
    "copy into host": ("read", lambda g: g.host.copy_(g.x)),
    "assign to host": ("read", lambda g: g.host.__setitem__(slice(None), g.x)),  # type: ignore[func-returns-value]
    "type": ("read", lambda g: g.x.type(torch.FloatTensor)),
    "pickle": ("read", lambda g: pickle.dumps(g.x)),
    "save": ("read", lambda g: torch.save(g.x, io.BytesIO())),  # type: ignore[func-returns-value]
    "storage element": ("read", lambda g: g.x.untyped_storage()[0]),
    "storage cpu": ("read", lambda g: g.x.untyped_storage().cpu()),
    "storage tolist": ("read", lambda g: g.x.untyped_storage().tolist()),
    "inverse": ("read", lambda g: torch.linalg.inv(g.x[:3, :3])),
    "equal": ("data_dependent", lambda g: torch.equal(g.x, g.x)),
    "nonzero": ("dynamic_shape", lambda g: g.x.nonzero()),
    "where of one": ("dynamic_shape", lambda g: torch.where(g.x > 0)),
    "masked_select": ("dynamic_shape", lambda g: g.x.masked_select(g.x > 0)),
    "unique": ("dynamic_shape", lambda g: torch.unique(g.ids)),
    "repeat_interleave": ("dynamic_shape", lambda g: g.x.repeat_interleave(g.ids, 0)),
    "bincount": ("dynamic_shape", lambda g: torch.bincount(g.ids)),
    "print": ("dynamic_shape", lambda g: repr(g.x)),
    "mask as index": ("boolean_index", lambda g: g.x[g.x > 0]),
    "assignment by mask": ("boolean_index", lambda g: g.x.__setitem__(g.x > 0, 0.0)),  # type: ignore[func-returns-value]
    "host operand": ("host_argument", lambda g: g.host + g.x),
    "host out": ("host_argument", lambda g: torch.sum(g.x, 0, out=torch.empty(4))),
    "host tensor indexed by device": ("host_argument", lambda g: g.host[g.ids]),
    "host index": ("host_index", lambda g: g.x[torch.tensor([0], dtype=torch.int32)]),
    "host index_select": ("host_index", lambda g: g.x.index_select(0, torch.tensor([0]))),
    "list as index": ("int64", lambda g: g.x[[0, 1]]),
    "int64 arange": ("int64", lambda g: torch.arange(3, device="sim")),
    "int64 put": ("int64", lambda g: torch.zeros(3, dtype=torch.int64).to("sim")),
    "int64 cast": ("int64", lambda g: g.ids.long()),
    "int64 sum": ("int64", lambda g: g.ids.sum()),
    "int64 drawn": ("int64", lambda g: torch.multinomial(g.x.abs(), 1)),
    "int64 kept": ("int64", lambda g: g.x.argmax(-1) + 1),
    "int64 view used": ("int64", lambda g: g.x.topk(2).indices[:, 0] + 1),
    "int64 to float": ("int64", lambda g: g.x.argmax(-1).float()),
    "negative index": ("negative_index", lambda g: g.x.index_select(0, g.ids - 1)),
    "negative index_put": ("negative_index", lambda g: g.x.index_put((g.ids - 1,), g.x)),
    "negative index_copy": ("negative_index", lambda g: g.x.clone().index_copy_(0, g.ids - 1, g.x)),
    "negative gather": ("negative_index", lambda g: g.x.gather(1, g.ids[:, None] - 1)),
    "index past the end": ("negative_index", lambda g: g.x[g.ids + 1]),
    "index past the second end": ("negative_index", lambda g: g.x[g.ids, g.ids + 2]),
    "token past the vocabulary": ("negative_index", lambda g: F.embedding(g.ids + 1, g.x)),
}

RAISES: dict[str, Callable[[Given], object]] = {
    "numpy": lambda g: g.x.numpy(),
    "asarray": lambda g: np.asarray(g.x),
    "dlpack": lambda g: np.from_dlpack(g.x),  # type: ignore[arg-type]
    "one_hot": lambda g: F.one_hot(g.ids),
    "a negative size": lambda g: torch.empty(-1, device="sim"),
}

ALLOWED: dict[str, Callable[[Given], object]] = {
    "shape, length, hash": lambda g: (g.x.shape, len(g.x), hash(g.x)),
    "iteration": lambda g: list(g.x),
    "scaling by a device number": lambda g: g.x * g.x[0, 0],
    "a bound on the device": lambda g: g.x.clamp(max=g.x[0, 0]),
    "a host number": lambda g: g.x + torch.tensor(1.0),
    "where": lambda g: torch.where(g.x > 0, g.x, 0.0),
    "masked_fill": lambda g: g.x.masked_fill(g.x > 0, 0.0),
    "infinity, unless forbidden": lambda g: torch.where(g.x > 0, g.x, -INFINITY),
    "topk": lambda g: g.x.topk(2).values,
    "argmax as int32": lambda g: g.x.argmax(-1).to(torch.int32),
    "order as int32": lambda g: g.x.sort(stable=True).indices[:, :1].to(torch.int32),
    "sum as int32": lambda g: g.ids.sum(dtype=torch.int32),
    "isfinite": lambda g: torch.isfinite(g.x).all(),
    "int32 index": lambda g: g.x[g.ids],
    "int32 index_put": lambda g: g.x.index_put((g.ids,), g.x),
    "int32 index_copy": lambda g: g.x.index_copy(0, g.ids, g.x),
    "int32 gather": lambda g: g.x.gather(1, g.ids[:, None]),
    "int32 embedding": lambda g: F.embedding(g.ids, g.x),
    "a host number as index": lambda g: g.x[torch.tensor(1)],
    "deepcopy": lambda g: copy.deepcopy(g.x),
    "to meta": lambda g: g.x.to("meta"),
    "share_memory": lambda g: g.x.share_memory_(),
}


class TestRefusals:
    @pytest.mark.parametrize("name", REFUSED)
    def test_is_refused_and_counted_once(self, name: str, given: Given) -> None:
        kind, act = REFUSED[name]
        assert refused(lambda: act(given)) == {kind: 1}

    @pytest.mark.parametrize("name", RAISES)
    def test_torch_itself_raises(self, name: str, given: Given) -> None:
        with pytest.raises((TypeError, RuntimeError, ValueError, BufferError)):
            RAISES[name](given)

    @pytest.mark.parametrize("name", ALLOWED)
    def test_passes_without_a_read(self, name: str, given: Given) -> None:
        made = counted(lambda: ALLOWED[name](given))
        assert (made.reads, made.uploads, dict(made.refused)) == (0, 0, {})

    def test_a_read_past_torch_kills_the_process(self) -> None:
        body = (
            "import torch, ctypes; from chipset.plugins.sim import device; device.load();"
            "ctypes.string_at(torch.ones(4).to('sim').data_ptr(), 4)"
        )
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", body], capture_output=True, check=False
        )
        assert done.returncode == -signal.SIGSEGV
        assert ctypes.string_at(torch.ones(4).data_ptr(), 4) == b"\0\0\x80?"

    def test_a_refused_write_leaves_the_tensor_as_it_was(self, given: Given) -> None:
        refused(lambda: given.x.index_put_((given.ids - 1,), given.x + 1))
        with watch.reading():
            assert torch.equal(given.x.cpu(), given.host)


class TestRules:
    def test_int64_passes_when_the_rule_is_off(self, given: Given) -> None:
        with watch.rule("int64", False), watch.reading():
            assert (g := given.x.argmax(-1) + 1).dtype == torch.int64
            assert torch.equal(g.cpu(), given.host.argmax(-1) + 1)

    def test_a_negative_index_counts_from_the_end_when_the_rule_is_off(self, given: Given) -> None:
        with watch.rule("negative_index", False), watch.reading():
            assert torch.equal(given.x[given.ids - 1].cpu(), given.host[[-1, 0, 1]])

    def test_an_index_past_the_end_is_still_torch_s_error(self, given: Given) -> None:
        with watch.rule("negative_index", False), pytest.raises(IndexError):
            given.x[given.ids + 1]

    def test_a_host_index_passes_when_the_rule_is_off(self, given: Given) -> None:
        at = torch.tensor([2, 0], dtype=torch.int32)
        with watch.rule("host_index", False), watch.reading():
            assert torch.equal(given.x[at].cpu(), given.host[[2, 0]])

    def test_a_mask_is_no_index_under_any_rule(self, given: Given) -> None:
        with watch.rule("negative_index", False), watch.rule("host_index", False):
            assert refused(lambda: given.x[given.x > 0]) == {"boolean_index": 1}

    def test_rules_return_to_what_they_were(self) -> None:
        for name in get_args(Rule):
            was = watch.set_rule(name, True)
            with watch.rule(name, False):
                pass
            assert watch.set_rule(name, was)

    def test_an_unknown_rule_is_named(self) -> None:
        with pytest.raises(ValueError, match="no rule manners; there are int64"):
            watch.set_rule("manners", True)  # type: ignore[arg-type]


@pytest.mark.usefixtures("infinity_forbidden")
class TestInfinity:
    @pytest.mark.parametrize(
        "act",
        [
            lambda g: torch.where(g.x > 0, g.x, -INFINITY),
            lambda g: g.x.masked_fill(g.x > 0, -INFINITY),
            lambda g: torch.full((2,), -INFINITY, device="sim"),
            lambda g: g.x + -INFINITY,
            lambda g: g.x.clamp(max=INFINITY),
            lambda g: torch.tensor([0.0, -INFINITY]).to("sim"),
            lambda g: torch.exp(g.x * 1e9),
            lambda g: g.x.mul_(3e38).mul_(1e9),
        ],
    )
    def test_is_refused(self, act: Callable[[Given], object], given: Given) -> None:
        assert refused(lambda: act(given)) == {"infinity": 1}

    @pytest.mark.parametrize(
        "act",
        [
            lambda g: torch.isfinite(g.x),
            lambda g: g.x < INFINITY,
            lambda g: torch.where(g.x > 0, g.x, torch.finfo(torch.float32).min),
            lambda g: g.x / g.x.new_zeros(()).add_(1.0),
            lambda g: g.x * float("nan"),
        ],
    )
    def test_passes(self, act: Callable[[Given], object], given: Given) -> None:
        assert counted(lambda: act(given)).refused == {}

    def test_moving_one_that_was_there_passes(self, given: Given) -> None:
        with watch.rule("infinity", False):
            stale = given.x.masked_fill(given.x > 0, INFINITY)
        assert counted(lambda: stale.index_select(0, given.ids)).refused == {}
        assert counted(lambda: stale.index_put_((given.ids[:1],), given.x[:1])).refused == {}


class TestPermit:
    def test_reads_and_counts_each(self, given: Given) -> None:
        def read() -> None:
            with watch.reading():
                assert torch.equal(given.x.cpu(), given.host)
                assert given.x[0, 0].item() == -1.0

        assert counted(read).reads == 2

    def test_nests(self, given: Given) -> None:
        with watch.reading():
            with watch.reading():
                given.x.cpu()
            given.x.cpu()
        assert refused(given.x.cpu) == {"read": 1}

    def test_ends_with_an_exception_too(self, given: Given) -> None:
        with pytest.raises(KeyError), watch.reading():
            raise KeyError
        assert refused(given.x.cpu) == {"read": 1}

    def test_is_of_one_thread(self, given: Given) -> None:
        seen: list[dict[str, int]] = []
        with watch.reading():
            other = threading.Thread(target=lambda: seen.append(refused(given.x.cpu)))
            other.start()
            other.join()
        assert seen == [{"read": 1}]

    def test_allows_no_shape_that_depends_on_data(self, given: Given) -> None:
        with watch.reading():
            assert refused(lambda: given.x.nonzero()) == {"dynamic_shape": 1}


class TestCounts:
    def test_uploads_by_dtype_and_bytes(self) -> None:
        made = counted(
            lambda: (torch.ones(3).to("sim"), torch.ones(2, dtype=torch.int32).to("sim"))
        )
        assert made.uploads == 2
        assert made.uploads_by_dtype == {"float32": 1, "int32": 1}
        assert made.uploaded_bytes == 3 * 4 + 2 * 4

    def test_an_upload_into_a_tensor_counts_what_arrives(self) -> None:
        target = torch.empty(3, dtype=torch.bfloat16, device="sim")
        made = counted(lambda: target.copy_(torch.ones(3)))
        assert (made.uploads_by_dtype, made.uploaded_bytes) == ({"bfloat16": 1}, 6)

    def test_numbers_ride_along_with_a_kernel(self, given: Given) -> None:
        made = counted(lambda: given.x.add_(1.5).mul_(torch.tensor(2.0)))
        assert (made.uploads, made.kernels) == (0, 2)

    def test_views_run_nothing(self, given: Given) -> None:
        made = counted(lambda: given.x.t()[1:].unsqueeze(0).expand(5, -1, -1).permute(2, 0, 1))
        assert made.kernels == 0

    def test_a_copy_on_the_device_is_a_kernel(self, given: Given) -> None:
        made = counted(lambda: given.x.to(torch.bfloat16).clone())
        assert (made.kernels, made.reads, made.uploads) == (2, 0, 0)

    def test_waits_in_any_spelling(self) -> None:
        def wait() -> None:
            device.synchronize()
            torch.accelerator.synchronize()
            torch.accelerator.current_stream().synchronize()

        assert counted(wait).synchronizes == 3

    def test_start_at_what_was_before(self) -> None:
        now = watch.counts()
        nothing = now - now
        assert nothing == DeviceCounts(
            reads=0,
            uploads=0,
            uploads_by_dtype={},
            uploaded_bytes=0,
            kernels=0,
            synchronizes=0,
            refused={},
        )
