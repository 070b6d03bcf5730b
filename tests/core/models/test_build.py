from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chipset.backends.quantization import LinearSpec, Verdict
from chipset.backends.reference.quantization import ReferenceLinear
from chipset.core.errors import ModelFormatError, UnsupportedArchitecture
from chipset.core.layers.linear import require_kernel
from chipset.core.loading.weight_source import Part
from chipset.core.models.build import build_decoder
from chipset.core.models.config import ModelConfig
from chipset.core.models.decoder import Decoder
from chipset.core.models.report import held_bytes
from chipset.core.models.spec import model_spec
from chipset.core.models.tensors import checkpoint_layout

from .cases import CASES, Case
from .harness import MAX_CONTEXT, Checkpoint, Session, TensorSource, cpu_backend, run

BY_NAME = {case.name: case for case in CASES}
Make = Callable[[Case], Checkpoint]
Stream = Iterable[tuple[str, Tensor]]


def build(config: ModelConfig, weights: Stream, **options: Any) -> Decoder:
    spec = model_spec(config, dtype="float32", max_context=MAX_CONTEXT)
    with torch.inference_mode():
        source = TensorSource(weights)
        return build_decoder(config, spec, cpu_backend(spec), source, **options).model


def equal_runs(
    checkpoint: Checkpoint, change: Callable[[Stream], Iterator[tuple[str, Tensor]]]
) -> bool:
    """Whether a checkpoint in another layout gives the same logits, bit by bit."""
    plain = run(checkpoint, checkpoint.config)
    changed = run(checkpoint, checkpoint.config, weights=change)
    return all(torch.equal(a, b) for a, b in zip(plain, changed, strict=True))


def test_a_missing_tensor_is_named(checkpoint: Checkpoint) -> None:
    name, _ = left_out = list(checkpoint.weights())[-1]
    kept = [entry for entry in checkpoint.weights() if entry[0] != left_out[0]]
    with pytest.raises(ModelFormatError, match="holds no tensor") as caught:
        build(checkpoint.config, kept)
    assert checkpoint_layout(checkpoint.config).canonical(name) in str(caught.value)


def test_a_tensor_of_the_wrong_shape_is_named(checkpoint: Checkpoint) -> None:
    name, tensor = next(iter(checkpoint.weights()))
    with pytest.raises(ModelFormatError, match="has the shape") as caught:
        build(checkpoint.config, [(name, tensor[..., :-1])])
    assert name in str(caught.value)


def test_a_size_of_the_config_that_the_tensors_deny_does_not_load(checkpoint_of: Make) -> None:
    checkpoint = checkpoint_of(BY_NAME["llama"])
    for size in ("vocab_size", "hidden_size", "intermediate_size", "num_kv_heads", "num_layers"):
        wrong = replace(checkpoint.config, **{size: getattr(checkpoint.config, size) - 1})
        if size == "num_layers":
            wrong = replace(wrong, windows=wrong.windows[:-1])
        with pytest.raises(ModelFormatError):
            build(wrong, checkpoint.weights())


@pytest.mark.parametrize("flag", ["gated", "tied_embeddings", "qk_norm", "norm_placement"])
def test_a_flag_that_the_tensors_deny_does_not_load(flag: str, checkpoint_of: Make) -> None:
    config = checkpoint_of(BY_NAME["gemma-3"]).config
    wrong = {"gated": False, "tied_embeddings": False, "qk_norm": False, "norm_placement": "pre"}
    with pytest.raises((ModelFormatError, ValueError)):
        build(
            replace(config, **{flag: wrong[flag]}),
            checkpoint_of(BY_NAME["gemma-3"]).weights(),
        )


def test_a_tensor_without_a_place_is_refused(checkpoint_of: Make) -> None:
    checkpoint = checkpoint_of(BY_NAME["llama"])
    extra = ("model.layers.0.self_attn.q_proj.bias", torch.zeros(32))
    with pytest.raises(ModelFormatError, match=r"q_proj\.bias"):
        build(checkpoint.config, [extra, *checkpoint.weights()])


def test_leftovers_of_old_checkpoints_are_ignored(checkpoint_of: Make) -> None:
    checkpoint = checkpoint_of(BY_NAME["llama"])
    extras = [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(4)),
        ("lm_head.weight", torch.zeros(97, 32)),  # tied: the embedding is the head
    ]
    with_extras = build(checkpoint.config, [*extras, *checkpoint.weights()])
    plain = build(checkpoint.config, checkpoint.weights())
    ours, theirs = with_extras.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_tensor_that_comes_twice_is_refused(checkpoint_of: Make) -> None:
    checkpoint = checkpoint_of(BY_NAME["llama"])
    again = ("layers.1.mlp.down_proj.weight", torch.zeros(32, 48))
    with pytest.raises(ModelFormatError, match="twice"):
        build(checkpoint.config, [*checkpoint.weights(), again])


def test_integers_are_refused(checkpoint_of: Make) -> None:
    checkpoint = checkpoint_of(BY_NAME["llama"])
    name, tensor = next(iter(checkpoint.weights()))
    with pytest.raises(ModelFormatError, match="int8"):
        build(checkpoint.config, [(name, tensor.to(torch.int8))])


def test_a_tied_embedding_is_held_once(checkpoint_of: Make) -> None:
    checkpoint = checkpoint_of(BY_NAME["llama"])
    model = build(checkpoint.config, checkpoint.weights())
    held = {buffer.data_ptr(): buffer.numel() for buffer in model.buffers()}
    tables = 2 * MAX_CONTEXT * 4  # cos and sin
    assert sum(held.values()) - tables == checkpoint_layout(checkpoint.config).num_parameters


def test_base_model_prefixes_are_optional(checkpoint: Checkpoint) -> None:
    prefix = checkpoint_layout(checkpoint.config).names.prefix

    def strip(stream: Stream) -> Iterator[tuple[str, Tensor]]:
        return ((name.removeprefix(prefix), tensor) for name, tensor in stream)

    assert any(name.startswith(prefix) for name, _ in checkpoint.weights())
    assert equal_runs(checkpoint, strip)


def test_packed_experts_equal_single_ones(checkpoint_of: Make) -> None:
    checkpoint = checkpoint_of(BY_NAME["mixtral"])

    def pack(stream: Stream) -> Iterator[tuple[str, Tensor]]:
        tensors = dict(stream)
        for layer in range(checkpoint.config.num_layers):
            there = f"model.layers.{layer}.block_sparse_moe."
            here = f"model.layers.{layer}.mlp."
            w1, w3, w2 = (
                torch.stack([tensors.pop(f"{there}experts.{e}.{name}.weight") for e in range(5)])
                for name in ("w1", "w3", "w2")
            )
            yield f"{here}experts.gate_up_proj", torch.cat((w1, w3), 1)
            yield f"{here}experts.down_proj", w2
            yield f"{here}gate.weight", tensors.pop(f"{there}gate.weight")
        yield from tensors.items()

    assert equal_runs(checkpoint, pack)


def test_weights_may_come_in_any_order(checkpoint: Checkpoint) -> None:
    assert equal_runs(checkpoint, lambda stream: iter(list(stream)[::-1]))


def test_progress_counts_every_byte(checkpoint: Checkpoint) -> None:
    seen: list[tuple[int, int]] = []
    build(checkpoint.config, checkpoint.weights(), progress=lambda *at: seen.append(at))
    total = sum(tensor.nbytes for _, tensor in checkpoint.weights())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert len(seen) > checkpoint.config.num_layers


def test_held_bytes_are_those_of_every_buffer_once(checkpoint_of: Make) -> None:
    checkpoint = checkpoint_of(BY_NAME["llama"])
    session = Session(checkpoint, checkpoint.config)
    tables = 2 * MAX_CONTEXT * 4 * 4  # cos and sin of half a head, in float32
    parameters = checkpoint_layout(checkpoint.config).num_parameters
    assert session.report.held_bytes == 4 * parameters + tables
    assert sum(session.report.kernels.values()) == 4 * checkpoint.config.num_layers + 1


def test_views_hold_their_whole_storage() -> None:
    module = nn.Module()
    module.register_buffer("a", torch.zeros(10)[:2])
    module.register_buffer("b", module.a)
    module.register_parameter("c", nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
    assert held_bytes(module) == 40 + 6


ATTENTION = "model.layers.1.self_attn"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"),
        (f"{ATTENTION}.attn.k_scale", f"{ATTENTION}.attn.v_scale"),
        (f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale"),
    ],
)
def test_scales_of_a_float8_cache_reach_its_layer(
    key: str, value: str, checkpoint_of: Make
) -> None:
    checkpoint = checkpoint_of(BY_NAME["llama"])
    scales = [(key, torch.tensor(0.5)), (value, torch.tensor([0.25]))]
    for kv_dtype, wanted in (("float8_e4m3fn", [0.5, 0.25]), ("auto", [None, None])):
        spec = model_spec(
            checkpoint.config, dtype="float32", kv_dtype=kv_dtype, max_context=MAX_CONTEXT
        )
        source = TensorSource([*checkpoint.weights(), *scales])
        plain = model_spec(checkpoint.config, dtype="float32", max_context=MAX_CONTEXT)
        built = build_decoder(checkpoint.config, spec, cpu_backend(plain), source)
        attention = built.model.layers[1].attention
        found = attention.key_scale, attention.value_scale
        assert [None if scale is None else scale.item() for scale in found] == wanted
        assert built.model.layers[0].attention.key_scale is None
        assert kv_dtype == "auto" or {scale.dtype for scale in found} == {torch.float32}


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ([(f"{ATTENTION}.k_scale", torch.zeros(()))], r"k_scale is 0\.0 and must be"),
        ([(f"{ATTENTION}.v_scale", torch.tensor(float("nan")))], "v_scale is nan"),
        ([(f"{ATTENTION}.k_scale", torch.ones(2))], r"k_scale is float32 \[2\]"),
        ([(f"{ATTENTION}.k_scale", torch.ones((), dtype=torch.int32))], "k_scale is int32"),
        (
            [(f"{ATTENTION}.{name}", torch.ones(())) for name in ("k_scale", "attn.k_scale")],
            "k_scale twice",
        ),
        ([(f"{ATTENTION}.q_scale", torch.ones(()))], "q_scale, for which"),
    ],
)
def test_malformed_scales_of_a_cache_are_named(
    extra: list[tuple[str, Tensor]], reason: str, checkpoint_of: Make
) -> None:
    checkpoint = checkpoint_of(BY_NAME["llama"])
    with pytest.raises(ModelFormatError, match=reason):
        build(checkpoint.config, [*checkpoint.weights(), *extra])


class Watched(TensorSource):
    """Knows how many bytes of what it read are still held."""

    held = 0
    most = 0

    def read(self, name: str, part: Part = ()) -> Tensor:
        found = super().read(name, part).clone()
        self.held += found.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(found, self.release, found.nbytes)
        return found

    def release(self, num_bytes: int) -> None:
        self.held -= num_bytes


def test_what_was_read_is_let_go_before_more_is_read(checkpoint: Checkpoint) -> None:
    source = Watched(checkpoint.weights())
    session = Session(checkpoint, checkpoint.config, source=source)
    assert session.model is not None
    assert source.held == 0
    assert source.most <= 2 * max(entry.num_bytes for entry in source.weights.values())


class Full(ReferenceLinear):
    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        return nn.Linear(2**40, 2**20)


def test_no_memory_for_a_module_is_a_memory_error(checkpoint_of: Make) -> None:
    checkpoint = checkpoint_of(BY_NAME["llama"])
    with pytest.raises(MemoryError, match=r"no memory for layers\.0\.attention\.qkv"):
        Session(checkpoint, checkpoint.config, linear=Full)


class NoKernel(ReferenceLinear):
    def kernels(self, spec: LinearSpec) -> tuple[Verdict, ...]:
        return (Verdict(kernel="torch", ok=False, reason="it rains"),)


def test_a_layer_that_no_kernel_takes_is_named_with_the_reason() -> None:
    spec = LinearSpec(
        name="head", in_features=2, out_features=2, parts=(2,), dtype="float32", out_dtype="float32"
    )
    linear = NoKernel(runtime=None)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedArchitecture, match=r"head .*it rains"):
        require_kernel(linear, spec)
