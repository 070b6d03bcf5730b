"""The emulated device computes what the CPU computes, in memory of its own."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from chipset.backends.errors import BackendUnavailable
from chipset.plugins.sim import device, watch

TWO_DEVICES = """
import torch
from chipset.plugins.sim import device
device.load(2)
device.load()
x = torch.ones(3, device="sim:1")
y = x.to("sim:0")
assert torch.accelerator.device_count() == 2
assert (x + x).device == torch.device("sim:1") and y.device == torch.device("sim:0")
assert torch.sim.memory_allocated(0) == torch.sim.memory_allocated(1) == 12
with torch.device("sim:1"):
    assert torch.zeros(2).device.index == 1
torch.sim.set_device(1)
assert torch.sim.current_device() == 1 and torch.empty(2, device="sim").device.index == 1
for act in (lambda: x + y, lambda: torch.ones(3, device="sim:2"), lambda: device.load(3)):
    try:
        act()
    except Exception as error:
        print(type(error).__name__)
"""


@pytest.fixture(autouse=True, scope="module")
def _loaded() -> None:
    device.load()


@pytest.fixture
def total_memory() -> Iterator[Callable[[int], None]]:
    yield device.set_total_memory
    device.set_total_memory()


def host(tensor: Tensor) -> Tensor:
    with watch.reading():
        return tensor.cpu()


def same(on_device: Tensor, on_host: Tensor) -> bool:
    """Equal in every bit, nan included, and in shape, dtype and strides."""
    back = host(on_device)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[back.itemsize]
    return (
        on_device.device.type == "sim"
        and on_device.stride() == on_host.stride()
        and back.dtype == on_host.dtype
        and torch.equal(back.contiguous().view(bits), on_host.contiguous().view(bits))
    )


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "arithmetic": lambda x, w, i: (x * 2.0 - x.square() / (x.abs() + 1)).rsqrt(),
    "matmul": lambda x, w, i: x @ w,
    "linear": lambda x, w, i: F.linear(x, w, w[0]),
    "batched": lambda x, w, i: torch.einsum("rq,qd->rd", x, w)[None] @ w,
    "softmax": lambda x, w, i: torch.softmax(x, -1),
    "attention": lambda x, w, i: F.scaled_dot_product_attention(x[None], w[None], w[None]),
    "causal attention": lambda x, w, i: F.scaled_dot_product_attention(
        w[None, None], w[None, None], w[None, None], is_causal=True
    ),
    "norm": lambda x, w, i: F.layer_norm(x, x.shape[-1:], w[0], w[1]),
    "gelu": lambda x, w, i: F.gelu(x, approximate="tanh") + F.silu(x),
    "reduction": lambda x, w, i: x.mean(-1, keepdim=True) + x.amax() + x.cumsum(-1),
    "several results": lambda x, w, i: torch.cat((*torch.aminmax(x, dim=-1), x.sort(-1).values[0])),
    "parts": lambda x, w, i: torch.stack([part.clone() for part in x.chunk(3, -1)]),
    "gather": lambda x, w, i: x.index_select(0, i) + w[i][:, : x.shape[1]],
    "order": lambda x, w, i: x.argmax(-1).to(torch.int32),
    "comparison": lambda x, w, i: torch.where((x > 0) & (x < 1), x, torch.finfo(x.dtype).min),
    "integers": lambda x, w, i: ((i ^ 5) * -2048144789 >> 3) & 7,
    "transposed": lambda x, w, i: x.t().neg(),
    "cast": lambda x, w, i: x.to(torch.float16).float().to(torch.int32),
    "made there": lambda x, w, i: torch.arange(4, dtype=torch.int32, device=i.device) + i[0],
    "bits": lambda x, w, i: i.view(torch.float32),
    "windows": lambda x, w, i: w.unfold(0, 2, 1).contiguous(),
    "channels last": lambda x, w, i: torch.zeros(1, 2, 2, 2, device=x.device).contiguous(
        memory_format=torch.channels_last
    ),
    "scatter": lambda x, w, i: torch.zeros_like(x).scatter_add(0, i[:, None], x[: len(i)]),
    "empty": lambda x, w, i: x[:0] @ w,
}


class TestKernels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", KERNELS)
    def test_give_what_the_cpu_gives(self, name: str, dtype: torch.dtype) -> None:
        args = random(5, 6, dtype=dtype), random(6, 6, dtype=dtype), torch.tensor([3, 0, 2]).int()
        expected = KERNELS[name](*args)
        assert same(KERNELS[name](*(x.to("sim") for x in args)), expected)

    def test_random_numbers_are_the_cpu_s(self) -> None:
        torch.manual_seed(5)
        expected = torch.randn(7)
        torch.manual_seed(5)
        assert same(torch.randn(7, device="sim"), expected)

    def test_a_trace_runs_them(self) -> None:
        x, w = random(5, 6).to("sim"), random(6, 6).to("sim")

        def program(x: Tensor, w: Tensor) -> Tensor:
            return torch.softmax((x @ w).view(3, 10), -1)

        traced = make_fx(program, tracing_mode="fake")(x, w)
        assert same(traced(x, w), host(program(x, w)))

    def test_gradients_flow(self) -> None:
        layer = torch.nn.Linear(4, 3, device="sim")
        layer(random(2, 4).to("sim")).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.device.type == "sim"


class TestWriting:
    def test_through_a_view_is_seen_in_the_whole(self) -> None:
        x = random(4, 6)
        y = x.to("sim")
        for whole in (x, y):
            whole[1:3].t()[2].mul_(3.0)
            whole.view(-1)[5].fill_(7.0)
        assert same(y, x)

    def test_through_a_view_that_a_kernel_made_is_too(self) -> None:
        x = random(4, 6)
        y = x.to("sim")
        for whole in (x, y):
            whole.unfold(1, 2, 2)[0, 1].fill_(7.0)
        assert same(y, x)

    def test_in_place_gives_the_tensor_itself(self) -> None:
        y = random(4, 6).to("sim")
        assert y.add_(1) is y
        with torch.inference_mode():
            z = y.clone()
            assert torch.ops.aten.add_.Tensor(z, 1) is z
        assert y.index_put_((torch.zeros(1, dtype=torch.int32, device="sim"),), y[1:2] + 1) is y

    def test_into_a_large_cache_moves_the_rows_only(self) -> None:
        cache = torch.zeros(1 << 16, 64, device="sim")
        held, at = device.memory_allocated(), torch.tensor([5, 9], dtype=torch.int32).to("sim")
        rows = torch.ones(2, 64, device="sim")
        device.reset_peak_memory_stats()
        cache.index_put_((at,), rows)
        assert device.max_memory_allocated() < held + 4096
        assert host(cache[9]).sum() == 64
        assert host(cache.sum()) == 128

    def test_into_an_output_of_another_shape_resizes_it(self) -> None:
        x = random(4, 6)
        out = torch.empty(0, device="sim")
        assert torch.mul(x.to("sim"), 2.0, out=out) is out
        assert same(out, x * 2.0)

    def test_into_two_outputs(self) -> None:
        x = random(4, 6)
        low, high = torch.empty(4, device="sim"), torch.empty(4, device="sim")
        torch.aminmax(x.to("sim"), dim=-1, out=(low, high))
        assert same(low, x.amin(-1))
        assert same(high, x.amax(-1))

    def test_overlap_is_refused_as_on_the_cpu(self) -> None:
        y = torch.ones(4, device="sim")
        with pytest.raises(RuntimeError, match="refer to a single memory location"):
            y[1:].add_(y[:-1])

    def test_growing_keeps_what_was_there(self) -> None:
        x = random(4, 6)
        grown = x.to("sim").resize_(8, 6)
        assert same(grown[:4], x)

    def test_under_inference_mode_is_as_on_the_cpu(self) -> None:
        outside = torch.ones(3, device="sim")
        with torch.inference_mode():
            outside.add_(1)
            inside = outside * 2
            inside.mul_(2)
        assert not outside.is_inference()
        assert inside.is_inference()
        assert host(outside + 0).tolist() == [2.0] * 3
        assert host(inside).tolist() == [8.0] * 3
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            inside.add_(1)

    @given(data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_any_chain_of_views_and_writes_ends_alike(self, data: st.DataObject) -> None:
        base = random(4, 6)
        wholes = [base.clone(), base.to("sim")]
        views = list(wholes)
        for _ in range(data.draw(st.integers(1, 8))):
            step = data.draw(st.sampled_from(STEPS))
            size, number = views[0].shape[0], data.draw(st.integers(0, 3))
            views = [step(view, number % size) for view in views]
        assert same(views[1], views[0])
        assert same(wholes[1], wholes[0])


STEPS: tuple[Callable[[Tensor, int], Tensor], ...] = (
    lambda x, n: x.t(),
    lambda x, n: x[n:],
    lambda x, n: x[:, : n + 1],
    lambda x, n: x.add_(n),
    lambda x, n: x.mul_(x.sum()),
    lambda x, n: x.as_strided((1, 2), (1, 1), x.storage_offset()) if x.numel() > 1 else x,
    lambda x, n: (
        x.index_copy_(0, torch.tensor([n]).to(x.device, torch.int32), x[:1] + 1)
        if x.device.type == "sim"
        else x.index_copy_(0, torch.tensor([n]), x[:1] + 1)
    ),
    lambda x, n: x[n].fill_(n)[None],
    lambda x, n: x.reshape(-1, 1),
    lambda x, n: x.contiguous().neg_(),
)


class TestMemory:
    @pytest.fixture(autouse=True)
    def _nothing_dies_meanwhile(self) -> None:
        # what earlier tests left in cycles, such as the frames of an exception
        gc.collect()

    def test_is_counted_and_given_back(self) -> None:
        before = device.memory_allocated()
        x = torch.empty(1000, 1000, device="sim")
        small = [torch.empty(n, dtype=torch.uint8, device="sim") for n in range(100)]
        assert device.memory_allocated() - before == 4_000_000 + sum(range(100))
        free, total = device.mem_get_info()
        assert total - free == device.memory_allocated()
        del x, small
        assert device.memory_allocated() == before

    def test_peak_starts_again_when_told(self) -> None:
        before = device.memory_allocated()
        torch.empty(1 << 20, dtype=torch.uint8, device="sim")
        assert device.max_memory_allocated() >= before + (1 << 20)
        device.reset_peak_memory_stats()
        assert device.max_memory_allocated() == before

    def test_ends_with_a_typed_error_and_nothing_lost(
        self, total_memory: Callable[[int], None]
    ) -> None:
        before = device.memory_allocated()
        total_memory(before + 4096)
        with pytest.raises(torch.OutOfMemoryError, match="sim device is out of memory: 8000 bytes"):
            torch.empty(8000, dtype=torch.uint8, device="sim")
        assert device.memory_allocated() == before
        assert torch.empty(4096, dtype=torch.uint8, device="sim").numel() == 4096

    def test_is_used_again_unclean(self) -> None:
        address = torch.full((100,), 3.0, device="sim").data_ptr()
        again = torch.empty(100, device="sim")
        assert again.data_ptr() == address
        assert host(again).tolist() == [3.0] * 100

    def test_of_many_threads_adds_up(self) -> None:
        before = device.memory_allocated()

        def work() -> None:
            for size in range(1, 200):
                torch.ones(size, device="sim").add_(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert device.memory_allocated() == before


class TestModule:
    def test_is_torch_s_module_of_the_device(self) -> None:
        device.load()
        assert torch.get_device_module("sim") is device
        assert torch.accelerator.current_accelerator() == torch.device("sim")
        assert device.is_available()
        assert torch.ones(1, device="sim").device == torch.device("sim", 0)

    def test_refuses_another_number_of_devices_later(self) -> None:
        with pytest.raises(BackendUnavailable, match="loaded with 8 devices, not 4"):
            device.load(4)

    def test_devices_have_memory_of_their_own(self) -> None:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", TWO_DEVICES],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.split() == ["AcceleratorError", "IndexError", "BackendUnavailable"]
        assert not done.stderr


class Decoder(torch.nn.Module):
    """Two layers with rotary positions, a paged cache and a drawn id."""

    def __init__(self, size: int = 32, heads: int = 4, vocab: int = 61) -> None:
        super().__init__()
        self.heads, self.embedding = heads, torch.nn.Embedding(vocab, size)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(size, 3 * size) for _ in range(2))
        self.up = torch.nn.ModuleList(torch.nn.Linear(size, 4 * size) for _ in range(2))
        self.down = torch.nn.ModuleList(torch.nn.Linear(2 * size, size) for _ in range(2))

    def forward(self, ids: Tensor, positions: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
        """ids, positions, slots [T] i32, cache [2, 2, S, heads, D] -> [T] i32."""
        x = F.embedding(ids, self.embedding.weight)
        index = torch.arange(cache.shape[2], dtype=torch.int32, device=x.device)
        seen = index <= positions[:, None]
        for layer in range(2):
            qkv = self.qkv[layer](F.rms_norm(x, x.shape[-1:])).unflatten(-1, (3, self.heads, -1))
            angle = positions[:, None, None].to(x.dtype) * 0.3
            q, k, v = qkv.unbind(1)
            q, k = q * angle.cos() + q.flip(-1) * angle.sin(), k * angle.cos()
            cache[layer, 0].index_put_((slots,), k)
            cache[layer, 1].index_put_((slots,), v)
            keys, values = cache[layer].permute(0, 2, 1, 3).unbind(0)
            scores = torch.where(seen, q.transpose(0, 1) @ keys.mT, torch.finfo(x.dtype).min)
            x = x + (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)
            gate, up = self.up[layer](F.rms_norm(x, x.shape[-1:])).chunk(2, -1)
            x = x + self.down[layer](F.silu(gate) * up)
        return (x @ self.embedding.weight.t()).argmax(-1).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_decoder_draws_and_caches_what_it_does_on_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(11)
    model = Decoder().to(dtype)
    ids = torch.tensor([3, 14, 15, 9, 26, 5], dtype=torch.int32)
    positions = torch.arange(6, dtype=torch.int32)
    cache = torch.zeros(2, 2, 8, 4, 8, dtype=dtype)
    inputs = ids, positions, positions.flip(0), cache
    moved = [x.to("sim") for x in inputs]
    with torch.inference_mode():
        expected = model(*inputs)
        model.to("sim")
        before = watch.counts()
        drawn = model(*moved)
        made = watch.counts() - before
    assert (made.reads, made.uploads, made.refused) == (0, 0, {})
    assert same(drawn, expected)
    assert same(moved[3], cache)
