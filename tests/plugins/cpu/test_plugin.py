from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from chipset.backends.errors import Incompatible, TooLarge
from chipset.backends.options import (
    AttentionSpec,
    EngineOptions,
    KVGroup,
    ModelSpec,
    ParallelOptions,
    ResolvedOptions,
    SamplingParams,
)
from chipset.backends.registry import Registry
from chipset.backends.shapes import BatchShape, Phase
from chipset.plugins.cpu.plugin import CPUPlugin

MODEL = ModelSpec(
    architecture="LlamaForCausalLM",
    num_layers=1,
    hidden_size=32,
    vocab_size=100,
    max_context=1024,
    dtype="float32",
    weight_bytes=1000,
    groups=(
        KVGroup(
            kind="full", layers=(0,), num_kv_heads=2, head_size=8, value_size=8, dtype="float32"
        ),
    ),
    attention=(
        AttentionSpec(num_heads=4, num_kv_heads=2, head_size=8, value_size=8, scale=0.4, group=0),
    ),
)


def plugin(tmp_path: Path, flags: str = "avx2") -> CPUPlugin:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : {flags}\n")
    return CPUPlugin(cpuinfo)


def resolve(cpu: CPUPlugin, **options: object) -> ResolvedOptions:
    return cpu.resolve(EngineOptions(**options), MODEL, cpu.capabilities(cpu.probe()))


def test_auto_finds_it_by_its_entry_point() -> None:
    selection = Registry.discover().select("cpu")
    assert isinstance(selection.plugin, CPUPlugin)
    assert selection.probe.available
    assert selection.probe.num_devices == 1
    assert selection.probe.priority == 0
    assert not selection.probe.simulated


def test_the_parent_half_imports_no_torch() -> None:
    program = (
        "import sys; from chipset.backends.registry import Registry; "
        "plugin = Registry.discover().load('cpu'); plugin.capabilities(plugin.probe()); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_probe_names_the_architecture(tmp_path: Path) -> None:
    probe = plugin(tmp_path, "avx2 avx512f avx512_bf16").probe()
    assert probe.architecture == "avx512_bf16"
    assert "avx512_bf16" in probe.reason


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("avx2", "float32"),
        ("avx512f", "float32"),
        ("avx512f avx512_bf16", "bfloat16"),
        ("amx_bf16", "bfloat16"),
    ],
)
def test_auto_dtype_is_bfloat16_only_where_the_cpu_multiplies_it(
    tmp_path: Path, flags: str, dtype: str
) -> None:
    options = resolve(plugin(tmp_path, flags))
    assert (options.dtype, options.kv_dtype) == (dtype, dtype)
    assert "bfloat16" in options.reasons["dtype"]


def test_auto_dtype_is_bfloat16_where_weights_are_packed(tmp_path: Path) -> None:
    one = plugin(tmp_path, "avx2")
    packed = replace(MODEL, packed=True)
    options = one.resolve(EngineOptions(), packed, one.capabilities(one.probe()))
    assert options.dtype == "bfloat16"
    assert "packed" in options.reasons["dtype"]
    asked = EngineOptions(dtype="float32")
    assert one.resolve(asked, packed, one.capabilities(one.probe())).dtype == "float32"


def test_what_the_user_asks_for_is_honoured(tmp_path: Path) -> None:
    options = resolve(
        plugin(tmp_path),
        dtype="bfloat16",
        kv_dtype="float32",
        block_size=64,
        max_context=100,
        max_batch_tokens=77,
        max_batch_rows=5,
        kv_bytes=10**6,
        memory_utilisation=0.5,
    )
    assert (options.dtype, options.kv_dtype, options.block_size) == ("bfloat16", "float32", 64)
    assert (options.max_context, options.max_batch_tokens, options.max_batch_rows) == (100, 77, 5)
    assert (options.kv_bytes, options.memory_utilisation) == (10**6, 0.5)


def test_every_choice_has_its_reason(tmp_path: Path) -> None:
    options = resolve(plugin(tmp_path))
    names = set(ResolvedOptions.__dataclass_fields__) - {"reasons"}
    assert set(options.reasons) == names
    assert all(options.reasons.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float16"}, "dtype float16.*auto, bfloat16, float32"),
        (
            {"kv_dtype": "fp8"},
            "kv_dtype .--kv-cache-dtype. fp8.*auto, bfloat16, float32, float8_e4m3fn",
        ),
        ({"block_size": 48}, "block_size 48.*16, 32, 64, 128"),
        ({"max_context": 1025}, "max_context 1025.*1024"),
        ({"max_context": 0}, "max_context 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens 0"),
        ({"max_batch_rows": -1}, "max_batch_rows -1"),
        ({"kv_bytes": 0}, "kv_bytes 0"),
        ({"memory_utilisation": 0.0}, "memory_utilisation 0"),
        ({"memory_utilisation": 1.1}, "memory_utilisation 1.1"),
        ({"parallel": ParallelOptions(tensor=65)}, "65 shards.*at most 64"),
        ({"parallel": ParallelOptions(pipeline=2)}, "2 pipeline stages.*shards"),
        ({"parallel": ParallelOptions(expert=True)}, "spread experts.*leave"),
        ({"backend_options": {"speed": "11"}}, "backend option speed.*leave it out"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_choices_and_cure(
    tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(Incompatible, match=words) as caught:
        resolve(plugin(tmp_path), **options)
    assert "\n" not in str(caught.value)


def test_resolving_twice_gives_the_same(tmp_path: Path) -> None:
    cpu = plugin(tmp_path)
    assert resolve(cpu) == resolve(cpu)


def test_requests_that_ask_for_too_much_are_refused(tmp_path: Path) -> None:
    cpu = plugin(tmp_path)
    options, capabilities = resolve(cpu), cpu.capabilities(cpu.probe())

    def refusal(**params: object) -> str | None:
        sampling = SamplingParams(**params)
        return cpu.check_request(sampling, frozenset(), options, capabilities)

    assert refusal(temperature=1.0, top_p=0.9, num_logprobs=20, frequency_penalty=1.0) is None
    assert "watermark" in str(refusal(watermark=True))
    assert "20" in str(refusal(num_logprobs=21))
    assert "320" in str(refusal(logit_bias=dict.fromkeys(range(321), 1.0)))


def test_steps_have_their_exact_shape_and_limits(tmp_path: Path) -> None:
    cpu = plugin(tmp_path)
    policy = cpu.shapes(resolve(cpu, max_batch_tokens=50, max_batch_rows=4), MODEL)

    def shape(rows: int, tokens: int) -> BatchShape:
        return BatchShape(
            phase=Phase.MIXED,
            num_rows=rows,
            num_tokens=tokens,
            num_logits=0,
            max_query=9,
            max_context=100,
            max_computed=91,
            num_blocks=8,
            max_block=9,
        )

    bucket = policy.fit(shape(3, 50))
    assert (bucket.num_rows, bucket.num_tokens, bucket.num_logits) == (3, 50, 1)
    assert bucket.blocks_per_row == 4
    with pytest.raises(TooLarge, match="tokens above 50"):
        policy.fit(shape(3, 51))
    with pytest.raises(TooLarge, match="rows above 4"):
        policy.fit(shape(5, 9))
    assert policy.buckets(100) == ()
