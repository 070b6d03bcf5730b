"""The comparison of logits sees every flag: a fault planted in our model makes it fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields

import pytest

from chipset.core.models.config import ModelConfig

from .cases import CASES, Case, Fault
from .harness import TOLERANCE, Checkpoint, difference, run

PLANTED = [pytest.param(c, f, id=f"{c.name}: {f.name}") for c in CASES for f in c.faults]

NO_FLAGS = {
    "architecture",
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_kv_heads",
    "num_heads",
    "head_size",
    "intermediate_size",
    "num_experts",
    "max_positions",
    "bos_id",
    "eos_ids",
}
"""Names and sizes: a wrong size does not load (test_build), a wrong id changes no logit."""

SEEN_ELSEWHERE = {
    "norm_weight_in_float",  # alike in float32: tests/core/layers/test_norm.py
    "gated",  # without it a checkpoint's gate has no place, and with it is missed: test_build
    "tied_embeddings",  # planted where a head is there to be left out; else it is missed: test_build
}


@pytest.mark.parametrize(("case", "fault"), PLANTED)
def test_a_planted_fault_is_seen(
    case: Case, fault: Fault, checkpoint_of: Callable[[Case], Checkpoint]
) -> None:
    checkpoint = checkpoint_of(case)
    faulty = run(checkpoint, fault.config(checkpoint.config), weights=fault.weights)
    assert difference(checkpoint, faulty) > TOLERANCE


def test_every_flag_that_an_architecture_sets_is_planted(
    checkpoint_of: Callable[[Case], Checkpoint],
) -> None:
    planted: set[tuple[str, str]] = set()
    needed: set[tuple[str, str]] = set()
    for case in CASES:
        config = checkpoint_of(case).config
        for field in fields(ModelConfig):
            value, key = getattr(config, field.name), (case.architecture, field.name)
            faulty = (getattr(fault.config(config), field.name) for fault in case.faults)
            if any(other != value for other in faulty):
                planted.add(key)
            if field.default is MISSING or value != field.default:
                needed.add(key)
    unseen = {key for key in needed if key[1] not in NO_FLAGS | SEEN_ELSEWHERE} - planted
    assert not unseen
    flags = {field.name for field in fields(ModelConfig)} - NO_FLAGS - SEEN_ELSEWHERE
    assert flags <= {flag for _, flag in planted}
