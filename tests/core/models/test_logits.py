"""Our logits are Transformers' on every architecture served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from chipset.core.layers.rope import LongRopeScaling
from chipset.core.models.families import FAMILIES

from .cases import CASES, Case
from .harness import (
    MAX_CONTEXT,
    NUM_DECODE,
    PROMPTS,
    TOLERANCE,
    Checkpoint,
    Session,
    difference,
    run,
    their_logits,
)

BY_NAME = {case.name: case for case in CASES}


def test_logits_equal_those_of_transformers(checkpoint: Checkpoint) -> None:
    assert difference(checkpoint, run(checkpoint, checkpoint.config)) <= TOLERANCE


def test_every_family_is_compared() -> None:
    assert {case.architecture for case in CASES} == set(FAMILIES)


def test_every_prompt_outgrows_its_window_and_its_original_length(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    lengths = [w for w in config.windows if w is not None]
    for rope in (config.rope, config.local_rope):
        original = getattr(rope and rope.scaling, "original_max_positions", None)
        lengths += [original] if original is not None else []
    assert max(lengths, default=0) < min(PROMPTS)


def test_bfloat16_is_no_further_from_float32_than_that_of_transformers(
    checkpoint: Checkpoint,
) -> None:
    """On average: weights of std 0.5 saturate softmax and experts, so single logits may differ much."""
    exact = torch.cat(checkpoint.logits)
    ours = torch.cat(run(checkpoint, checkpoint.config, dtype="bfloat16"))
    theirs = torch.cat(their_logits(checkpoint.folder, checkpoint.texts, torch.bfloat16))
    assert bool(torch.isfinite(ours).all())
    assert (ours - exact).abs().mean() <= 1.2 * (theirs - exact).abs().mean()


def test_only_the_rows_asked_for_go_through_the_head(
    checkpoint_of: Callable[[Case], Checkpoint],
) -> None:
    checkpoint = checkpoint_of(BY_NAME["llama"])
    session = Session(checkpoint, checkpoint.config)
    batch = session.batch(checkpoint.texts, [0, 0], [9, 5])
    picked = batch.logit_index[[3, 8, 13]]
    bucket = replace(batch.bucket, num_logits=3)
    sampling = replace(batch.sampling, slot=picked * 0 + 2, position=picked * 0)
    few = replace(batch, bucket=bucket, num_logits=3, logit_index=picked, sampling=sampling)
    with torch.inference_mode():
        logits, _ = session.step(session.backend.prepare(few), session.cache)
    theirs = torch.stack(
        [checkpoint.logits[0][3], checkpoint.logits[0][8], checkpoint.logits[1][4]]
    )
    assert logits.shape == theirs.shape
    assert (logits - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_a_window_that_no_text_outgrows_is_full_attention(
    checkpoint_of: Callable[[Case], Checkpoint],
) -> None:
    checkpoint = checkpoint_of(BY_NAME["gemma-2"])
    config = checkpoint.config
    wide = replace(config, windows=tuple(MAX_CONTEXT if w else None for w in config.windows))
    none = replace(config, windows=(None,) * config.num_layers)
    session = Session(checkpoint, wide)
    assert [group.kind for group in session.spec.groups] == ["full"]
    for ours, theirs in zip(run(checkpoint, wide), run(checkpoint, none), strict=True):
        assert torch.equal(ours, theirs)


def test_a_layer_whose_window_no_text_outgrows_keeps_its_local_rope(
    checkpoint_of: Callable[[Case], Checkpoint],
) -> None:
    checkpoint = checkpoint_of(BY_NAME["gemma-3"])
    config = checkpoint.config
    grouped, merged = (
        replace(config, windows=tuple(window if w else None for w in config.windows))
        for window in (MAX_CONTEXT - 1, MAX_CONTEXT)
    )
    assert len(Session(checkpoint, grouped).spec.groups) == 2
    assert len(Session(checkpoint, merged).spec.groups) == 1
    ours, theirs = torch.cat(run(checkpoint, merged)), torch.cat(run(checkpoint, grouped))
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_longrope_takes_its_short_factors_where_the_served_context_is_short(
    checkpoint_of: Callable[[Case], Checkpoint],
) -> None:
    checkpoint = checkpoint_of(BY_NAME["phi-3"])
    config = checkpoint.config
    assert config.rope is not None
    assert isinstance(config.rope.scaling, LongRopeScaling)
    original = 2 * MAX_CONTEXT
    scaling = replace(config.rope.scaling, original_max_positions=original)
    served = replace(config, rope=replace(config.rope, scaling=scaling))
    always = replace(scaling, long_factor=scaling.short_factor)
    short = replace(config, rope=replace(config.rope, scaling=always))
    for context, is_equal in ((original, True), (original + 1, False)):
        ours = torch.cat(run(checkpoint, served, max_context=context))
        theirs = torch.cat(run(checkpoint, short, max_context=context))
        assert torch.equal(ours, theirs) == is_equal


def test_texts_have_prompts_and_decode_steps(checkpoint: Checkpoint) -> None:
    assert [len(text) for text in checkpoint.texts] == [n + NUM_DECODE for n in PROMPTS]


@pytest.mark.parametrize("name", ["llama", "llama-3"])
def test_tied_and_separate_heads_are_told_apart(
    name: str, checkpoint_of: Callable[[Case], Checkpoint]
) -> None:
    checkpoint = checkpoint_of(BY_NAME[name])
    held = {tensor for tensor, _ in checkpoint.weights()}
    assert checkpoint.config.tied_embeddings == ("lm_head.weight" not in held)
