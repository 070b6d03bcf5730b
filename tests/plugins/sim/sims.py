"""What the simulators' tests share: their names, a session of one, and steps for it."""

from __future__ import annotations

import torch

from chipset.backends.conformance.modules import Reader
from chipset.backends.conformance.rows import Row
from chipset.backends.conformance.session import Session
from chipset.backends.conformance.suite import small_model
from chipset.backends.options import EngineOptions
from chipset.backends.registry import Registry

SIMS = ("sim-gaudi", "sim-gpu", "sim-neuron", "sim-tpu")


def make_session(name: str, **options: object) -> Session:
    """Of a model without weights, with small buckets."""
    plugin = Registry.discover().select(name).plugin
    asked = EngineOptions(
        **({"max_batch_tokens": 64, "max_context": 64, "max_batch_rows": 4} | options)
    )
    return Session(plugin, small_model(), asked, num_blocks=8)


def prompt(length: int = 5, *, block: int = 1, slot: int = 0, start: int = 0) -> Row:
    """A prefill row in one block."""
    return Row(token_ids=tuple(range(length)), start=start, blocks=((block,),), slot=slot)


def decode(start: int = 5, *, block: int = 1, slot: int = 0) -> Row:
    """A decode row in one block."""
    return Row(token_ids=(7,), start=start, blocks=((block,),), slot=slot, is_decode=True)


def table(session: Session) -> Reader:
    """A model whose logits are a row of random numbers for each token."""
    generator = torch.Generator().manual_seed(1)
    size = session.launch.model.vocab_size
    return session.table(torch.randn(size, size, generator=generator))
