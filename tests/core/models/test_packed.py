"""Packed checkpoints are served as what their numbers are worth, whole and cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from quantizers import Recipe, awq_recipe, fp8_recipe, gptq_recipe
from torch import Tensor

from chipset.backends.formats import Axis, Packed, Scheme, StoredTensor
from chipset.backends.quantization import LinearSpec, Verdict, WeightFormat
from chipset.backends.reference.quantization import ReferenceLinear
from chipset.core.errors import ModelFormatError
from chipset.core.models.shard import Shard
from chipset.core.quantization.on_the_fly import OnTheFlyScheme

from .cases import CASES, Case
from .harness import TOLERANCE, Checkpoint, Session, TensorSource
from .packing import LAYERS, PackedCheckpoint, Unpacking, open_session, pack, run_packed, run_values
from .ranks import Ranks

BY_NAME = {case.name: case for case in CASES}
Make = Callable[[Case], Checkpoint]
AWQ = awq_recipe(16)
RECIPES = (
    AWQ,
    awq_recipe(-1),
    gptq_recipe(16),
    gptq_recipe(16, bits=8, symmetric=False, version=2),
    gptq_recipe(16, desc_act=True, symmetric=False),
    gptq_recipe(-1),
    fp8_recipe("layer", static=True),
    fp8_recipe("row"),
    fp8_recipe((16, 16)),
)


def assert_alike(packed: PackedCheckpoint, size: int) -> None:
    wanted = torch.cat(run_values(packed))
    for logits in run_packed(packed, size):
        assert (torch.cat(logits) - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_format_is_served_whole_and_cut(
    recipe: Recipe, size: int, checkpoint_of: Make
) -> None:
    packed = pack(checkpoint_of(BY_NAME["llama-3"]), recipe)
    assert_alike(packed, size)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("recipe", [AWQ, fp8_recipe((16, 16))], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("name", ["phi-3", "bloom", "mixtral"])
def test_fused_interleaved_and_expert_layers_are_served_packed(
    name: str, recipe: Recipe, size: int, checkpoint_of: Make
) -> None:
    packed = pack(checkpoint_of(BY_NAME[name]), recipe)
    assert_alike(packed, size)
    session = open_session(packed, Shard(rank=size - 1, size=size))
    assert isinstance(session.backend.linear, Unpacking)
    kinds = {spec.name.split(".")[-1]: spec.weight.kind for spec in session.backend.linear.specs}
    kind = "int4" if recipe is AWQ else "fp8"
    down = "down"
    assert kinds["qkv"] == kinds["o"] == kinds["gate_up"] == kinds[down] == kind
    assert kinds.get("router", "plain") == "plain"


def test_more_ranks_than_heads_hold_packed_zeros(checkpoint_of: Make) -> None:
    packed = pack(checkpoint_of(BY_NAME["llama-3"]), AWQ)
    assert_alike(packed, 5)


def test_a_rank_reads_the_entries_of_its_part_only(checkpoint_of: Make) -> None:
    packed = pack(checkpoint_of(BY_NAME["llama"]), AWQ)
    total = sum(tensor.nbytes for tensor in packed.stored.values())
    everywhere = sum(t.nbytes for name, t in packed.stored.items() if "norm" in name)
    # a group of 16 inputs of down lies on both ranks
    shared = 3 * 32 * (2 + 0.5)
    read = []
    for rank in range(2):
        source = TensorSource(packed.stored.items())
        Session(
            packed.plain,
            packed.plain.config,
            source=source,
            scheme=packed.scheme,
            linear=Unpacking,
            shard=Shard(rank=rank, size=2),
        )
        read.append(source.bytes_read)
    inputs = 16 * 32 * 3 / 2  # of down's words, eight more inputs on each rank
    assert sum(read) == total + everywhere + shared + inputs


class Picky(ReferenceLinear):
    """Takes plain weights and int4."""

    def kernels(self, spec: LinearSpec) -> Sequence[Verdict]:
        kind = spec.weight.kind
        return (Verdict(kernel="picky", ok=kind == "plain", reason=f"dislikes {kind}"),)


@pytest.mark.parametrize("name", ["llama-3", "mixtral"])
def test_what_no_kernel_takes_is_dequantised_and_counted(name: str, checkpoint_of: Make) -> None:
    packed = pack(checkpoint_of(BY_NAME[name]), AWQ)
    session = open_session(packed, linear=Picky)
    (logits,) = Ranks(1).run(lambda rank, comm: session.run(packed.plain.texts))
    ours, wanted = torch.cat(logits), torch.cat(run_values(packed))
    assert (ours - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    report, layers = session.report, packed.plain.config.num_layers
    assert report.dequantised == {"picky: dislikes int4": 4 * layers}
    assert report.kernels == {"plain by picky": (5 if name == "mixtral" else 4) * layers + 1}
    numbers = sum(t.numel() for n, t in packed.values.items() if f"{n}" not in packed.stored)
    held = numbers / 2 + numbers / 16 * 8
    assert report.dequantised_bytes == 4 * numbers - held


def test_kernels_are_counted_by_kind(checkpoint_of: Make) -> None:
    packed = pack(checkpoint_of(BY_NAME["llama"]), AWQ)
    report = open_session(packed).report
    assert report.kernels == {"int4 by any": 12, "plain by any": 1}
    assert report.dequantised == {}
    assert report.dequantised_bytes == 0


def test_parts_of_unlike_formats_lie_side_by_side(checkpoint_of: Make) -> None:
    """v is plain, q and k are packed."""
    packed = pack(checkpoint_of(BY_NAME["llama-3"]), AWQ)
    stored = {n: t for n, t in packed.stored.items() if ".v_proj.q" not in n}
    stored = {n: t for n, t in stored.items() if ".v_proj.scales" not in n}
    stored |= {n: t for n, t in packed.values.items() if ".v_proj." in n}
    mixed = replace(packed, stored=stored)
    for size in (1, 2):
        assert_alike(mixed, size)
    linear = open_session(mixed).backend.linear
    assert isinstance(linear, Unpacking)
    found = {spec.name: spec.weight.kind for spec in linear.specs}
    assert [found[f"layers.0.attention.qkv.{i}"] for i in range(3)] == ["int4", "int4", "plain"]


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("name", ["llama-3", "mixtral"])
def test_plain_checkpoints_are_quantised_while_they_load(
    name: str, kind: str, checkpoint_of: Make
) -> None:
    checkpoint = checkpoint_of(BY_NAME[name])
    session = Session(
        checkpoint,
        checkpoint.config,
        scheme=OnTheFlyScheme(kind),
        linear=Unpacking,  # type: ignore[arg-type]
    )
    layers = checkpoint.config.num_layers
    plain = layers + 1 if name == "mixtral" else 1
    assert session.report.kernels == {f"{kind} by any": 4 * layers, "plain by any": plain}


def test_stacked_experts_are_quantised_like_single_ones(checkpoint_of: Make) -> None:
    checkpoint = checkpoint_of(BY_NAME["mixtral"])
    tensors = dict(checkpoint.weights())
    for layer in range(checkpoint.config.num_layers):
        there, here = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        w1, w3, w2 = (
            torch.stack([tensors.pop(f"{there}experts.{e}.{name}.weight") for e in range(5)])
            for name in ("w1", "w3", "w2")
        )
        tensors[f"{here}experts.gate_up_proj"] = torch.cat((w1, w3), 1)
        tensors[f"{here}experts.down_proj"] = w2
    found = [
        Session(
            checkpoint,
            checkpoint.config,
            source=source,
            scheme=OnTheFlyScheme("int4"),
            linear=Unpacking,
        ).model.state_dict()
        for source in (checkpoint.source(), TensorSource(tensors.items()))
    ]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class HalvesScheme(Scheme):
    """A kind that only its own format knows: half of each number, in bfloat16."""

    name = "halves"

    def stored(
        self, module: str, in_features: int, out_features: int
    ) -> Mapping[str, StoredTensor] | None:
        axes = (Axis(of="out"), Axis(of="in"))
        return {"half": StoredTensor(dtypes=("bfloat16",), axes=axes)}

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:
        return Packed(format=WeightFormat(kind="halves"), tensors={"half": tensors["half"]})

    def dequantise(self, packed: Packed) -> Tensor | None:
        return 2 * packed.tensors["half"].float() if packed.format.kind == "halves" else None


class Doubling(Unpacking):
    def worth(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
        if spec.weight.kind == "halves":
            return 2 * tensors["half"].float()
        return super().worth(spec, tensors)


@pytest.mark.parametrize(("size", "num_packed"), [(1, [7]), (2, [7, 7]), (3, [7, 7, 3])])
def test_a_kind_that_only_its_format_knows_stays_packed_where_nothing_is_padded(
    size: int, num_packed: list[int], checkpoint_of: Make
) -> None:
    checkpoint = checkpoint_of(BY_NAME["llama"])
    tensors = dict(checkpoint.weights())
    names = [name for name in tensors if name.endswith("_proj.weight")]
    stored = {name: tensor for name, tensor in tensors.items() if name not in names}
    stored |= {f"{name[:-7]}.half": (tensors[name] / 2).bfloat16() for name in names}
    values = tensors | {name: tensors[name].bfloat16().float() for name in names}
    packed = PackedCheckpoint(plain=checkpoint, scheme=HalvesScheme(), stored=stored, values=values)
    wanted = torch.cat(run_values(packed))

    def work(rank: int, comm: object) -> tuple[Mapping[str, int], tuple[Tensor, ...]]:
        shard = Shard(rank=rank, size=size)
        session = open_session(packed, shard, comm=comm, linear=Doubling)
        return session.report.kernels, session.run(checkpoint.texts)

    found = Ranks(size).run(work)
    layers = checkpoint.config.num_layers
    assert [kernels["halves by any"] for kernels, _ in found] == [n * layers for n in num_packed]
    for _, logits in found:
        assert (torch.cat(logits) - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def test_experts_of_a_kind_that_only_its_format_knows_are_dequantised(
    checkpoint_of: Make,
) -> None:
    checkpoint = checkpoint_of(BY_NAME["mixtral"])
    tensors = dict(checkpoint.weights())
    names = [name for name in tensors if LAYERS.search(name)]
    stored = {name: tensor for name, tensor in tensors.items() if name not in names}
    stored |= {f"{name[:-7]}.half": (tensors[name] / 2).bfloat16() for name in names}
    values = tensors | {name: tensors[name].bfloat16().float() for name in names}
    packed = PackedCheckpoint(plain=checkpoint, scheme=HalvesScheme(), stored=stored, values=values)
    session = open_session(packed, linear=Doubling)
    layers, experts = checkpoint.config.num_layers, checkpoint.config.num_experts
    assert session.report.dequantised == {"experts in formats of their own": layers * experts * 3}
    numbers = sum(tensors[name].numel() for name in names if ".experts." in name)
    assert session.report.dequantised_bytes == 2 * numbers
    (logits,) = Ranks(1).run(lambda rank, comm: session.run(checkpoint.texts))
    ours, wanted = torch.cat(logits), torch.cat(run_values(packed))
    assert (ours - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def without(stored: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in stored.items() if key != name}


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: without(s, f"{Q}.scales"), r"no tensor layers\.1\.self_attn\.q_proj\.scales"),
        (lambda s: without(s, f"{Q}.qweight"), r"no tensor layers\.1\.self_attn\.q_proj\.qweight"),
        (
            lambda s: {**s, f"{Q}.scales": s[f"{Q}.scales"][:1]},
            r"q_proj\.scales has the shape \[1, 32\] where config\.json asks for \[2, 32\]",
        ),
        (
            lambda s: {**s, f"{Q}.qweight": s[f"{Q}.qweight"][:, :-1]},
            r"q_proj\.qweight has the shape \[32, 3\] where config\.json asks for \[32, 4\]",
        ),
        (
            lambda s: {**s, f"{Q}.qzeros": s[f"{Q}.qzeros"].long()},
            r"q_proj\.qzeros holds int64, and awq has int32",
        ),
        (
            lambda s: {**s, f"{Q}.scales": s[f"{Q}.scales"] * float("nan")},
            r"model\.layers\.1\.self_attn\.q_proj: scales holds nan",
        ),
        (lambda s: {**s, f"{Q}.g_idx": torch.zeros(32)}, r"holds .*q_proj\.g_idx, for which"),
        (lambda s: {**s, f"{Q}.bias": torch.ones(32)}, r"holds .*q_proj\.bias, for which"),
    ],
)
def test_a_malformed_packed_checkpoint_is_refused_by_the_tensors_name(
    change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    reason: str,
    checkpoint_of: Make,
) -> None:
    packed = pack(checkpoint_of(BY_NAME["llama"]), AWQ)
    with pytest.raises(ModelFormatError, match=reason):
        open_session(replace(packed, stored=change(packed.stored)))


def test_a_group_size_that_the_files_deny_is_refused(checkpoint_of: Make) -> None:
    packed = pack(checkpoint_of(BY_NAME["llama"]), AWQ)
    other = pack(checkpoint_of(BY_NAME["llama"]), awq_recipe(8))
    with pytest.raises(ModelFormatError, match=r"q(zeros|_proj|weight|.*)"):
        open_session(replace(packed, scheme=other.scheme))


def test_a_packed_layers_bias_of_zeros_is_no_bias(checkpoint_of: Make) -> None:
    packed = pack(checkpoint_of(BY_NAME["llama"]), AWQ)
    padded = replace(packed, stored={**packed.stored, f"{Q}.bias": torch.zeros(32)})
    ours, theirs = (open_session(one).model.state_dict() for one in (padded, packed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_unpacked_integer_weight_is_refused(checkpoint_of: Make) -> None:
    packed = pack(checkpoint_of(BY_NAME["llama"]), AWQ)
    name = "model.layers.0.mlp.up_proj.weight"
    stored = {n: t for n, t in packed.stored.items() if ".layers.0.mlp.up_proj." not in n}
    stored[name] = torch.zeros(48, 32, dtype=torch.int8)
    with pytest.raises(ModelFormatError, match="up_proj"):
        open_session(replace(packed, stored=stored))
