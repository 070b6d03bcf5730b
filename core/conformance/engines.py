"""Engines under test, what they answer, and whether two of them answer alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ...backends.options import EngineOptions
from ...backends.plugin import Plugin
from ...backends.registry import Selection
from ..engine import Engine
from ..files import ModelFiles
from ..messages import EngineLaunch
from ..startup import start_engine
from .ties import Comparison
from .traffic import Answer, Arrival


@contextmanager
def one_thread() -> Iterator[None]:
    """A model this small only loses by more; whatever a backend chose for itself is restored."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def running(
    plugin: Plugin, files: ModelFiles, options: EngineOptions, *, quantize: str | None = None
) -> Iterator[Engine]:
    """An engine on that plugin, in this process. `quantize`: --quantize."""
    launch = EngineLaunch(
        commands="",
        events="",
        files=files,
        backend=plugin.info.name,
        options=options,
        quantize=quantize,
    )
    probe = plugin.probe()
    assert probe.available, probe.reason
    selection = Selection(plugin=plugin, probe=probe, reason="under test")
    engine = start_engine(launch, lambda *_: None, selection)
    try:
        yield engine
    finally:
        engine.close()


def compare(
    arrivals: Sequence[Arrival], ours: Mapping[int, Answer], theirs: Mapping[int, Answer]
) -> Comparison:
    """Texts token by token; one whose client left, as far as both came."""
    gaps: dict[tuple[int, ...], float] = {}
    for arrival in arrivals:
        text = list(arrival.submit.prompt)
        for token in theirs[arrival.submit.request_id].tokens:
            best = token.top_logprobs
            gaps[tuple(text)] = best[0] - best[1]
            text.append(token.id)
    comparison = Comparison(lambda text: gaps.get(tuple(text), math.inf))
    for arrival in arrivals:
        submit = arrival.submit
        mine, yours = ours[submit.request_id].ids, theirs[submit.request_id].ids
        if arrival.leaves is not None:
            shorter = min(len(mine), len(yours))
            mine, yours = mine[:shorter], yours[:shorter]
        comparison.add(f"request {submit.request_id}", submit.prompt, mine, yours)
    return comparison
