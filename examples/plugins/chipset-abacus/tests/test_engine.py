"""Texts of an engine on the abacus: packed while loading, packed in the files, plain, and cut over ranks; counted."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from chipset.backends.conformance.session import make_launch
from chipset.backends.conformance.suite import small_model
from chipset.backends.options import EngineOptions, ParallelOptions
from chipset.core.conformance.checkpoint import FULL, make_checkpoint
from chipset.core.conformance.suite import running
from chipset.core.conformance.traffic import Arrival, make_submit, serve
from safetensors.torch import load_file, save_file

from chipset_abacus.beads import decode, encode
from chipset_abacus.plugin import AbacusPlugin

OPTIONS = EngineOptions(dtype="float32", max_context=128, max_batch_rows=4, kv_bytes=2**22)
NUM_TOKENS = 16
NUM_PACKED = 2 * 7
"""Layers of the model, times its projections: q, k, v, o, gate, up, down."""


class Answers:
    """What an engine says to three prompts at once, and what the backend counted."""

    def __init__(self, files: object, quantize: str | None = None, num_ranks: int = 1) -> None:
        options = replace(OPTIONS, parallel=ParallelOptions(tensor=num_ranks))
        prompts = ([3, 1, 4], list(range(50, 90)), [200, 7] * 8)
        arrivals = [Arrival(submit=make_submit(n, p, NUM_TOKENS)) for n, p in enumerate(prompts)]
        with running(AbacusPlugin(), files, options, quantize=quantize) as engine:
            self.texts = {n: answer.ids for n, answer in serve(engine, arrivals).items()}
            self.counted: Mapping[str, float] = engine.stats().backend
            self.steps = engine.stats().steps
            self.kernels = engine.ready.kernels


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_checkpoint(FULL, tmp_path_factory.mktemp("plain"), seed=5)


@pytest.fixture(scope="module")
def packed(plain, tmp_path_factory):
    """The same model as a checkpoint in the format, and as plain numbers that the format can say."""
    folder = tmp_path_factory.mktemp("packed")
    files = {name: rewritten(plain, folder / name) for name in ("beads", "numbers")}
    found = {name: {} for name in files}
    for name, tensor in load_file(plain.weights[0]).items():
        if not name.endswith("proj.weight"):
            found["beads"][name] = found["numbers"][name] = tensor
            continue
        beads = encode(tensor)
        found["beads"] |= {name.replace("weight", kind): t for kind, t in beads.items()}
        found["numbers"][name] = decode(beads["weight"]) * beads["scale"][:, None]
    for name, tensors in found.items():
        save_file(tensors, files[name].weights[0])
    config = json.loads(files["beads"].config.read_text())
    config["quantization_config"] = {"quant_method": "abacus"}
    files["beads"].config.write_text(json.dumps(config))
    return files


def rewritten(files, folder: Path):
    folder.mkdir()
    config, weights = folder / "config.json", folder / "model.safetensors"
    config.write_text(files.config.read_text())
    return replace(files, config=config, weights=(weights,))


def test_a_model_that_fits_the_format_keeps_its_text(packed) -> None:
    wanted = Answers(packed["numbers"])
    assert "bead_products" not in wanted.counted
    found = Answers(packed["beads"])
    assert found.texts == wanted.texts
    assert found.kernels["abacus by beads"] == NUM_PACKED


def test_packing_while_loading_gives_what_the_files_would_hold(plain, packed) -> None:
    found = Answers(plain, quantize="abacus")
    assert found.texts == Answers(packed["beads"]).texts
    assert found.kernels["abacus by beads"] == NUM_PACKED
    assert found.texts != Answers(plain).texts


def test_every_part_of_its_own_ran(packed) -> None:
    found = Answers(packed["beads"])
    assert found.counted["bead_products"] >= NUM_PACKED * found.steps
    assert found.counted["attention_blocks"] >= 2 * found.steps
    assert "sums" not in found.counted, "a single rank has nobody to add up with"


def test_two_ranks_give_the_text_of_one_by_its_own_sum(packed) -> None:
    found = Answers(packed["beads"], num_ranks=2)
    assert found.texts == Answers(packed["beads"]).texts
    # the embedding, and in each of two layers attention and MLP
    assert found.counted["sums"] >= 5 * found.steps


def test_shapes_are_few_and_known() -> None:
    model = small_model(max_context=8192)
    options = EngineOptions(max_batch_rows=64, max_context=8192)
    shapes = make_launch(AbacusPlugin(), model, options).shapes
    # 8, 32, 128 and 256 tokens, or 1, 4, 16 and 64 rows; 4, 16, 64 and 256 blocks a row
    assert len(shapes.buckets(1000)) == (4 + 4) * 4
