from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chipset.backends.reference.collectives import SingleRank
from chipset.core.models.build import build_decoder

from .cases import CASES, Case
from .harness import Checkpoint, Session

BY_NAME = {case.name: case for case in CASES}


class Counted(SingleRank):
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        self.calls.append(("all_reduce", group))
        return super().all_reduce(x, group)

    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        self.calls.append(("all_gather", group))
        return super().all_gather(x, group, dim)


def step(session: Session, checkpoint: Checkpoint) -> Tensor:
    batch = session.batch(checkpoint.texts, [0, 0], [5, 3])
    with torch.inference_mode():
        logits, session.cache = session.step(session.backend.prepare(batch), session.cache)
    return logits


def test_ranks_add_up_after_the_embedding_and_after_both_halves_of_each_layer(
    checkpoint: Checkpoint,
) -> None:
    session = Session(checkpoint, checkpoint.config)
    comm = session.backend.comm = Counted()
    with torch.inference_mode():
        built = build_decoder(checkpoint.config, session.spec, session.backend, checkpoint.source())
    session.step = session.backend.compiler.wrap("model", built.model)
    step(session, checkpoint)
    reduces = 1 + 2 * checkpoint.config.num_layers
    assert comm.calls == [("all_reduce", "tensor")] * reduces + [("all_gather", "tensor")]


def test_every_tensor_is_a_buffer_so_that_compilers_find_it(checkpoint: Checkpoint) -> None:
    model = Session(checkpoint, checkpoint.config).model
    assert not list(model.parameters())
    loose = [
        (type(module).__name__, name)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    assert not loose


def test_logits_are_float32_whatever_the_dtype(
    checkpoint_of: Callable[[Case], Checkpoint],
) -> None:
    checkpoint = checkpoint_of(BY_NAME["llama"])
    for dtype in ("float32", "bfloat16"):
        session = Session(checkpoint, checkpoint.config, dtype=dtype)
        held = {b.dtype for name, b in session.model.named_buffers() if "rotaries" not in name}
        assert held == {getattr(torch, dtype)}
        logits = step(session, checkpoint)
        assert (logits.dtype, tuple(logits.shape)) == (torch.float32, (8, 97))


def test_the_embedding_multiplier_is_rounded_to_the_dtype(
    checkpoint_of: Callable[[Case], Checkpoint],
) -> None:
    checkpoint = checkpoint_of(BY_NAME["gemma-2"])
    multipliers = {
        dtype: Session(checkpoint, checkpoint.config, dtype=dtype).model.embedding.multiplier
        for dtype in ("float32", "bfloat16")
    }
    assert multipliers["float32"] == torch.tensor(32**0.5).item()
    assert multipliers["bfloat16"] == torch.tensor(32**0.5).bfloat16().item()
