"""What a step of the engine costs beside the device."""

from __future__ import annotations

import cProfile
import pstats
from pathlib import Path

from chipset.backends.options import EngineOptions
from chipset.backends.registry import Registry
from chipset.core.conformance.checkpoint import FULL, make_checkpoint
from chipset.core.conformance.suite import running
from chipset.core.conformance.traffic import make_submit

NUM_STEPS = 1000
MEMBER_CALLS = ("prepare", "attend", "rms_norm", "fetch", "result", "reset_slot")


def test_no_hook_is_dispatched_in_a_thousand_steps(tmp_path: Path) -> None:
    plugin = Registry.discover().select("cpu").plugin
    options = EngineOptions(dtype="float32", kv_bytes=4 << 20)
    profile = cProfile.Profile()
    with running(plugin, make_checkpoint(FULL, tmp_path), options) as engine:
        for number in range(24):
            engine.submit(make_submit(number, range(number + 1), 200))
        profile.enable()
        for step in range(NUM_STEPS):
            if engine.is_idle:
                engine.submit(make_submit(1000 + step, range(9), 400))
            engine.step()
        profile.disable()
    calls = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    names = {name for _, _, name in calls}
    assert set(MEMBER_CALLS) <= names, "the profile saw no steps"
    dispatched = [key for key in calls if "pluggy" in key[0]]
    assert not dispatched
