"""The parent halves: found by name, honest about what they are, resolved with reasons."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chipset.backends.conformance.suite import small_model
from chipset.backends.errors import Incompatible
from chipset.backends.options import EngineOptions, ParallelOptions, ResolvedOptions
from chipset.backends.plugin import Plugin
from chipset.backends.registry import Registry

from .sims import SIMS

MODEL = small_model(max_context=2048)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover()


def resolve(plugin: Plugin, **options: object) -> ResolvedOptions:
    return plugin.resolve(EngineOptions(**options), MODEL, plugin.capabilities(plugin.probe()))


def test_each_is_available_by_name_and_simulated(registry: Registry, name: str) -> None:
    selection = registry.select(name)
    assert selection.probe.simulated
    assert selection.probe.num_devices == 8
    assert not selection.probe.found_hardware
    assert "tests the engine, no kernels" in selection.plugin.info.summary


def test_auto_never_takes_one(registry: Registry) -> None:
    assert registry.select("auto").plugin.info.name == "cpu"


def test_without_a_compiler_the_cure_is_named(
    registry: Registry, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = registry.select(name).plugin
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CHIPSET_CACHE", str(tmp_path))
    probe = plugin.probe()
    assert not probe.available
    assert "apt-get install g++" in probe.reason
    assert probe.simulated
    built = tmp_path / "build" / "abc" / "device.so"
    built.parent.mkdir(parents=True)
    built.touch()
    assert plugin.probe().available


def test_the_parent_half_imports_no_torch_and_builds_nothing() -> None:
    code = (
        "import sys\n"
        "from chipset.backends.registry import Registry\n"
        "from chipset.backends.options import EngineOptions\n"
        f"for name in {SIMS!r}:\n"
        "    plugin = Registry.discover().select(name).plugin\n"
        "    plugin.capabilities(plugin.probe())\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_option_has_a_value_and_a_reason(registry: Registry, name: str) -> None:
    resolved = resolve(registry.select(name).plugin)
    fields = set(ResolvedOptions.__dataclass_fields__) - {"reasons"}
    assert set(resolved.reasons) == fields
    assert all(resolved.reasons.values())
    assert resolved.dtype == "float32"
    assert resolved.max_context == 512


WRONG = (
    {"dtype": "float16"},
    {"kv_dtype": "int4"},
    {"block_size": 7},
    {"max_context": 4096},
    {"max_batch_rows": 0},
    {"memory_utilisation": 1.5},
    {"parallel": ParallelOptions(tensor=9)},
    {"parallel": ParallelOptions(pipeline=2)},
    {"parallel": ParallelOptions(expert=True)},
    {"backend_options": {"x": "y"}},
)


@pytest.mark.parametrize("options", WRONG, ids=lambda options: next(iter(options)))
def test_what_cannot_be_honoured_is_refused(
    registry: Registry, name: str, options: dict[str, object]
) -> None:
    with pytest.raises(Incompatible):
        resolve(registry.select(name).plugin, **options)


def test_a_step_holds_the_longest_prompt_where_it_is_computed_whole(registry: Registry) -> None:
    plugin = registry.select("sim-neuron").plugin
    assert resolve(plugin).max_batch_tokens == 512
    assert resolve(plugin, max_context=1000).max_batch_tokens == 1000
    assert resolve(plugin, max_batch_tokens=100).max_context == 100
    with pytest.raises(Incompatible, match="one step"):
        resolve(plugin, max_batch_tokens=100, max_context=200)
    assert resolve(registry.select("sim-tpu").plugin).max_batch_tokens == 256


def test_each_has_the_rules_of_its_vendor(registry: Registry) -> None:
    found = {}
    for name in SIMS:
        plugin = registry.select(name).plugin
        capabilities = plugin.capabilities(plugin.probe())
        policy = plugin.shapes(resolve(plugin), MODEL).batch
        found[name] = (
            capabilities.graphs,
            capabilities.kv_budget,
            capabilities.chunked_prefill,
            capabilities.preemption,
            capabilities.overlapped_steps,
            capabilities.fused_draw,
            capabilities.block_sizes[0],
            policy.mixed,
            policy.max_prefills,
            policy.token_layout,
        )
    assert found == {
        "sim-gaudi": ("compile", "predict", True, True, False, False, 128, False, 2, "rows"),
        "sim-gpu": ("capture", "profile", True, True, False, False, 16, True, None, "packed"),
        "sim-neuron": (
            *("ahead_of_time", "predict", False, False, False, False),
            *(32, False, 1, "packed"),
        ),
        "sim-tpu": ("compile", "predict", True, True, True, True, 32, True, None, "packed"),
    }
