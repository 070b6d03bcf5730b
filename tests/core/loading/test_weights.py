from __future__ import annotations

import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from chipset.core.errors import ModelError, ModelFormatError
from chipset.core.files import ModelFiles
from chipset.core.loading.gguf_file import read_gguf
from chipset.core.loading.gguf_names import weight_parts
from chipset.core.loading.gguf_source import GgufSource
from chipset.core.loading.safetensors_source import SafetensorsSource
from chipset.core.loading.weights import open_weights

from .ggufs import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    llama_keys,
    llama_tensors,
    tiny_llama,
    write_gguf,
)


def _files(*weights: Path) -> ModelFiles:
    return ModelFiles(
        source="test",
        name="test",
        revision=None,
        config=weights[0],
        tokenizer=weights[0],
        tokenizer_config=None,
        chat_template=None,
        generation_config=None,
        weights=weights,
    )


def _read(*weights: Path) -> dict[str, torch.Tensor]:
    """Everything; blocks decoded."""
    is_gguf = weights[0].suffix == ".gguf"
    source = GgufSource(weights[0]) if is_gguf else SafetensorsSource(weights)
    return {name: source.read(name) for name in source.names}


def _blocks(tensor: np.ndarray, kind: Kind) -> torch.Tensor:
    """u8 [N, K / size of a block, bytes of a block]"""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    return torch.tensor(gguf.quantize(tensor, kind)).unflatten(1, (-1, size))


def _halves(stored: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as Transformers has them, from rows that alternate between the halves of each head."""
    return stored.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return llama_tensors(np.random.default_rng(0))


DECODED = [
    Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0,
]  # fmt: skip


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_decodes_what_gguf_encodes(
    tmp_path: Path, tensors: dict[str, np.ndarray], kind: Kind
) -> None:
    name = "blk.0.ffn_up.weight"
    path = write_gguf(tmp_path / "model.gguf", llama_keys(), tensors, {name: kind})
    expected = gguf.dequantize(gguf.quantize(tensors[name], kind), kind)
    assert torch.equal(
        _read(path)["model.layers.0.mlp.up_proj.weight"].float(), torch.tensor(expected)
    )


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_decodes_k_blocks(tmp_path: Path, kind: Kind) -> None:
    """gguf cannot encode these, so the blocks are bytes whose scales are set to 1."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 255, (6 * 3, block_bytes), dtype=np.uint8)
    one = np.array([1.0], dtype=np.float16).view(np.uint8)
    for at in (0, 2, block_bytes - 4, block_bytes - 2):
        blocks[:, at : at + 2] = one
    blocks = blocks.reshape(6, -1)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    decoded = _read(tmp_path / "model.gguf")["model.embed_tokens.weight"]
    assert decoded.shape == (6, 3 * block)
    assert torch.equal(decoded, torch.tensor(gguf.dequantize(blocks, kind)))


def test_names_the_weights_of_a_gguf_without_reading_them(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model.gguf")
    source = open_weights(_files(path))
    assert list(source.names) == list(_read(path))
    assert source.weights["model.norm.weight"].num_bytes == 4 * HIDDEN
    assert source.bytes_read == 0


def test_undoes_the_interleaving_of_rotary_rows(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    published = {"q": tensors["blk.0.attn_q.weight"], "k": tensors["blk.0.attn_k.weight"]}
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        halves = published[name].reshape(heads, 2, HEAD_DIM // 2, HIDDEN)
        tensors[f"blk.0.attn_{name}.weight"] = halves.swapaxes(1, 2).reshape(published[name].shape)
    weights = _read(write_gguf(tmp_path / "model.gguf", llama_keys(), tensors))
    for name in ("q", "k"):
        read = weights[f"model.layers.0.self_attn.{name}_proj.weight"]
        assert torch.equal(read, torch.tensor(published[name]))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_hands_out_blocks_that_stay_packed(
    tmp_path: Path, tensors: dict[str, np.ndarray], kind: Kind
) -> None:
    names = "blk.0.ffn_up.weight", "blk.0.attn_q.weight", "blk.0.attn_norm.weight"
    path = write_gguf(
        tmp_path / "model.gguf", llama_keys(), tensors, dict.fromkeys(names[:2], kind)
    )
    source = open_weights(_files(path))
    up, q = (f"model.layers.0.{name}" for name in ("mlp.up_proj", "self_attn.q_proj"))
    assert source.ggml_kinds == {up: kind.name, q: kind.name}
    blocks = _blocks(tensors[names[0]], kind)
    entry = source.weights[f"{up}.weight"]
    assert (entry.shape, entry.dtype) == (tuple(blocks.shape), "uint8")
    assert torch.equal(source.read(f"{up}.weight"), blocks)
    assert torch.equal(source.read(f"{q}.weight"), _halves(_blocks(tensors[names[1]], kind), HEADS))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q4_0, Kind.Q5_1], ids=lambda k: k.name)
@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.up_proj"])
def test_reads_the_bytes_of_a_part_only(
    tmp_path: Path, tensors: dict[str, np.ndarray], kind: Kind, name: str
) -> None:
    stored = {"self_attn.q_proj": "blk.0.attn_q.weight", "mlp.up_proj": "blk.0.ffn_up.weight"}
    path = write_gguf(tmp_path / "model.gguf", llama_keys(), tensors, {stored[name]: kind})
    key = f"model.layers.0.{name}.weight"
    whole = GgufSource(path).read(key)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    for rows, columns in ((slice(3, 9), slice(0, 64)), (slice(0, 5), slice(32, 64))):
        source = GgufSource(path)
        assert torch.equal(source.read(key, (rows, columns)), whole[rows, columns])
        num_rows, num_columns = rows.stop - rows.start, columns.stop - columns.start
        assert source.bytes_read == num_rows * num_columns // block * size
    inside = GgufSource(path).read(key, (slice(2, 4), slice(5, 50)))
    assert torch.equal(inside, whole[2:4, 5:50])


def test_parts_of_safetensors_are_read_alone(tmp_path: Path) -> None:
    stored = {
        "a": torch.arange(60, dtype=torch.bfloat16).reshape(3, 4, 5),
        "b": torch.tensor(7, dtype=torch.int32),
        "c": torch.arange(6, dtype=torch.float32).to(torch.float8_e4m3fn),
    }
    save_file(stored, tmp_path / "model.safetensors")
    source = SafetensorsSource([tmp_path / "model.safetensors"])
    part = source.read("a", (slice(1, 2), slice(1, 3), slice(2, 5)))
    assert torch.equal(part, stored["a"][1:2, 1:3, 2:5])
    assert source.bytes_read == 12
    assert torch.equal(source.read("b"), stored["b"])
    assert torch.equal(source.read("c", (slice(2, 6),)).float(), torch.arange(2.0, 6))
    assert source.bytes_read == 12 + 4 + 4


def test_tensors_need_not_be_aligned(tmp_path: Path) -> None:
    numbers = np.arange(6, dtype=np.float32)
    table = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [1, 25]},
    }
    path = _safetensors(tmp_path / "model.safetensors", table, b"!" + numbers.tobytes())
    assert torch.equal(_read(path)["b"], torch.tensor(numbers).reshape(2, 3))


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("1", "2"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelFormatError, match=r"a twice, in 1\.safetensors and 2\.safetensors"):
        _read(tmp_path / "1.safetensors", tmp_path / "2.safetensors")


def test_takes_the_one_off_gemmas_norms(tmp_path: Path) -> None:
    keys = {name.replace("llama.", "gemma.", 1): value for name, value in llama_keys().items()}
    keys["general.architecture"] = "gemma"
    tensors = {
        "output_norm.weight": np.array([1.5, 0.25], dtype=np.float32),
        "blk.0.attn_norm.weight": np.array([2.0, 3.0], dtype=np.float32),
    }
    weights = _read(write_gguf(tmp_path / "model.gguf", keys, tensors))
    assert weights["model.norm.weight"].tolist() == [0.5, -0.75]
    assert weights["model.layers.0.input_layernorm.weight"].tolist() == [1.0, 2.0]


def test_takes_stacked_experts_apart(tmp_path: Path) -> None:
    stacked = np.arange(3 * 4 * 32, dtype=np.float32).reshape(3, 4, 32)
    keys = llama_keys(llama__expert_count=3, llama__expert_used_count=2)
    kinds = {"blk.0.ffn_down_exps.weight": Kind.Q8_0}
    names = ("gate", "down", "up")
    tensors = {f"blk.0.ffn_{name}_exps.weight": stacked for name in names}
    weights = _read(write_gguf(tmp_path / "model.gguf", keys, tensors, kinds))
    assert len(weights) == 9
    prefix = "model.layers.0.block_sparse_moe.experts"
    assert torch.equal(weights[f"{prefix}.2.w1.weight"], torch.tensor(stacked[2]))
    rounded = gguf.dequantize(gguf.quantize(stacked[1], Kind.Q8_0), Kind.Q8_0)
    assert torch.equal(weights[f"{prefix}.1.w2.weight"], torch.tensor(rounded))


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"]
)
def test_names_agree_with_those_of_the_gguf_package(tmp_path: Path, architecture: str) -> None:
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    stems = {
        gguf.TENSOR_NAMES[kind].format(bid=0)
        for kind in gguf.MODEL_TENSORS[number]
        if not any(word in kind.name for word in ("ROPE", "EXP", "GATE_INP", "ROT", "CLS", "DENSE"))
    }
    if architecture == "phi3":
        stems -= {f"blk.0.{name}" for name in ("attn_q", "attn_k", "attn_v", "ffn_gate")}
    else:
        stems -= {"blk.0.attn_qkv"}
    keys = {
        name.replace("llama.", f"{architecture}.", 1): value for name, value in llama_keys().items()
    }
    keys["general.architecture"] = architecture
    tensors = {f"{stem}.weight": np.ones(2 * HEADS, dtype=np.float32) for stem in stems}
    path = write_gguf(tmp_path / "model.gguf", keys, tensors)
    names = gguf.get_tensor_name_map(number, 1)
    for part in weight_parts(read_gguf(path)):
        assert names.get_name(part.name, try_suffixes=(".weight",)) == part.stored.name


def test_refuses_a_tensor_without_a_place(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.surprise.weight"] = np.ones(4, dtype=np.float32)
    path = write_gguf(tmp_path / "model.gguf", llama_keys(), tensors)
    with pytest.raises(ModelFormatError, match=r"blk\.0\.surprise\.weight"):
        _read(path)


def test_a_mutated_file_is_read_or_refused(tmp_path: Path) -> None:
    original = tiny_llama(tmp_path / "model.gguf").read_bytes()
    rng = random.Random(1)
    path = tmp_path / "mutant.gguf"
    read = 0
    for _ in range(300):
        data = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(5000)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            _read(path)
            read += 1
        except ModelError:
            pass
    assert 10 < read < 290


def test_reads_every_shard_in_its_own_dtype(tmp_path: Path) -> None:
    first = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.arange(4.0)}
    second = {"c": torch.zeros(1, dtype=torch.float16)}
    save_file(first, tmp_path / "1.safetensors")
    save_file(second, tmp_path / "2.safetensors")
    files = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    weights = _read(*files)
    assert weights.keys() == {"a", "b", "c"}
    for name, tensor in (first | second).items():
        assert weights[name].dtype == tensor.dtype
        assert torch.equal(weights[name], tensor)
    entries = open_weights(_files(*files)).weights
    assert {name: entry.num_bytes for name, entry in entries.items()} == {"a": 12, "b": 16, "c": 2}


def _safetensors(path: Path, table: object, data: bytes) -> Path:
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("table", "data", "reason"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(4), "cut off"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8), "inconsistent"),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, bytes(8), "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8), "inconsistent"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}, bytes(6), "leaves a gap"),
        (
            {"a": {"dtype": "U8", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}},
            bytes(4),
            "inconsistent",
        ),
        ({"a": 3}, b"", "inconsistent"),
        ([], b"", "no JSON object"),
    ],
)
def test_refuses_a_broken_table(tmp_path: Path, table: object, data: bytes, reason: str) -> None:
    with pytest.raises(ModelFormatError, match=reason):
        _read(_safetensors(tmp_path / "model.safetensors", table, data))


@pytest.mark.parametrize("data", [b"", bytes(7), b"\xff" * 8, (4).to_bytes(8, "little") + b"nope"])
def test_refuses_what_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError):
        _read(path)


@pytest.mark.e2e
@pytest.mark.filterwarnings("default")
def test_default_model_is_bit_for_bit_what_transformers_reads(default_model: ModelFiles) -> None:
    from transformers import AutoModelForCausalLM

    path = default_model.weights[0]
    if path.suffix != ".gguf":
        pytest.skip("the default model came from the hub, as safetensors")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    expected = model.state_dict()
    expected.pop("lm_head.weight")
    weights = _read(path)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor.float(), expected[name]), name
