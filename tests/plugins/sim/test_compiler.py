"""Graphs: none after freeze, none split by what it does not read; captured addresses; caches given away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from chipset.backends.conformance.session import Session
from chipset.backends.errors import UnexpectedCompile
from chipset.backends.kv_cache import KVPlan
from chipset.plugins.sim import watch
from chipset.plugins.sim.graphs import Graph
from chipset.plugins.sim.rules import RuleBroken

from .sims import SIMS, decode, make_session, prompt, table

DONATING = ("sim-neuron", "sim-tpu")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def num_compiles(session: Session) -> float:
    return session.backend.telemetry.counters()["compiles"]


def host(tensor: torch.Tensor) -> np.ndarray:
    with watch.reading():
        found: np.ndarray = tensor.cpu().numpy()
    return found


def test_an_equal_step_makes_no_graph(session: Session) -> None:
    reader = table(session)
    session.draw(reader, session.batch([decode()]))
    before = num_compiles(session)
    assert before > 0
    session.draw(reader, session.batch([decode(6)]))
    assert num_compiles(session) == before


def test_what_would_compile_after_freeze_is_refused_with_the_cache_alive(session: Session) -> None:
    reader = table(session)
    first = session.batch([decode(), decode(block=2, slot=1)])
    session.draw(reader, first)
    features = session.launch.capabilities.features
    wide = session.batch([decode(), decode(block=2, slot=1)], features=features)
    with session.backend.compiler.freeze():
        with pytest.raises(UnexpectedCompile, match="after warm-up"):
            session.draw(reader, wide)
        assert session.backend.kv.usable(session.cache)
        session.draw(reader, first)
    counters = session.backend.telemetry.counters()
    assert counters["compiles_after_freeze"] == 1
    session.draw(reader, wide)


@pytest.mark.parametrize("two_graphs", ["sim-gaudi", "sim-gpu", "sim-neuron"])
def test_features_make_no_model_graph_and_buckets_no_draw_graph(two_graphs: str) -> None:
    session = make_session(two_graphs)
    reader = table(session)
    session.draw(reader, session.batch([decode()]))
    assert num_compiles(session) == 2
    features = session.launch.capabilities.features
    session.draw(reader, session.batch([decode()], features=features))
    assert num_compiles(session) == 3, "a variant costs one draw graph"
    session.draw(reader, session.batch([prompt()]))
    assert num_compiles(session) == (3 if two_graphs == "sim-gpu" else 4), (
        "a bucket costs one model graph, none where it is not captured"
    )


def test_two_modules_of_one_name_have_graphs_of_their_own(session: Session) -> None:
    batch = session.batch([decode()])
    size = session.launch.model.vocab_size
    one, other = (session.table(torch.full((size, size), value)) for value in (1.0, 2.0))
    assert (session.read(one, batch) == 1).all()
    assert (session.read(other, batch) == 2).all()
    assert (session.read(one, batch) == 1).all()


def test_a_captured_graph_knows_no_other_cache() -> None:
    session = make_session("sim-gpu")
    reader, batch = table(session), session.batch([decode()])
    session.draw(reader, batch)
    session.cache = session.backend.kv.allocate(session.plans)
    with pytest.raises(RuleBroken, match="captured addresses"):
        session.draw(reader, batch)


def test_what_a_captured_step_drew_is_gone_when_the_next_begins() -> None:
    session = make_session("sim-gpu")
    batch = session.batch([decode()])
    run = session.backend.compiler.wrap("model", table(session))
    prepare = session.backend.prepare
    first, session.cache = run(prepare(batch), session.cache)
    kept = host(first)
    assert np.isfinite(kept).all()
    run(prepare(session.batch([prompt()])), session.cache)
    assert np.isnan(host(first)).all()
    again, session.cache = run(prepare(batch), session.cache)
    assert again is first, "the output has its address"
    assert (host(again) == kept).all()


def test_what_was_fetched_in_time_is_whole_after_the_next_step() -> None:
    session = make_session("sim-gpu")
    reader = table(session)
    pending = session.start(reader, session.batch([decode()]))
    session.start(reader, session.batch([prompt()]))
    again = session.draw(reader, session.batch([decode()]))
    assert pending.result().ids[0] == again.ids[0]


@pytest.mark.parametrize("donating", DONATING)
def test_a_cache_given_away_is_garbage_and_refused(donating: str) -> None:
    session = make_session(donating)
    reader, batch = table(session), session.batch([decode()])
    before = session.cache
    session.draw(reader, batch)
    assert session.cache.last_ids is not before.last_ids
    assert (host(before.last_ids) == -(2**30)).all()
    assert session.cache.keys[0] is before.keys[0], "what the step left alone is the same"
    assert not session.backend.kv.usable(before)
    session.cache = before
    with pytest.raises(RuleBroken, match="donated cache"):
        session.draw(reader, batch)


@pytest.mark.parametrize("donating", DONATING)
def test_members_of_the_cache_give_it_away_too(donating: str) -> None:
    session = make_session(donating)
    before = session.cache
    kv = session.backend.kv
    session.cache = kv.copy_blocks(before, 0, np.array([[1, 2]], np.int32))
    assert np.isnan(host(before.keys[0])).all()
    assert not kv.usable(before)
    assert kv.usable(session.cache)


@pytest.mark.parametrize("in_place", ["sim-gaudi", "sim-gpu"])
def test_a_cache_written_in_place_is_never_lost(in_place: str) -> None:
    session = make_session(in_place)
    before = [leaf.data_ptr() for leaf in pytree.tree_leaves(session.cache)]
    old = session.cache
    session.draw(table(session), session.batch([decode()]))
    assert session.backend.kv.usable(old)
    assert [leaf.data_ptr() for leaf in pytree.tree_leaves(session.cache)] == before


@pytest.mark.parametrize("named", SIMS)
def test_a_step_that_dies_takes_a_donated_cache_with_it(
    named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(named)
    reader, batch = table(session), session.batch([decode()])
    session.draw(reader, batch)

    def die(self: Graph, args: object) -> None:
        raise RuntimeError("the device is unwell")

    for graph in type(session.backend.compiler).graph.__mro__[:-1]:
        monkeypatch.setattr(graph, "run", die)
    with pytest.raises(RuntimeError, match="unwell"):
        session.draw(reader, batch)
    assert session.backend.kv.usable(session.cache) == (named not in DONATING)


def test_a_wrapped_function_wants_a_cache(session: Session) -> None:
    run = session.backend.compiler.wrap("model", table(session))
    with pytest.raises(RuleBroken, match="before the cache is allocated"):
        run(session.backend.prepare(session.batch([decode()])), None)


@pytest.mark.parametrize("fixed", ["sim-gaudi", "sim-neuron", "sim-tpu"])
def test_the_cache_has_its_size_for_good_once_a_graph_is_made(fixed: str) -> None:
    session = make_session(fixed)
    kv = session.backend.kv
    plan = session.plans[0]
    more = [KVPlan(group=plan.group, num_blocks=plan.num_blocks + 1)]
    kv.allocate(more)
    kv.allocate(session.plans)
    session.draw(table(session), session.batch([decode()]))
    kv.allocate(session.plans)
    with pytest.raises(RuleBroken, match="KV size"):
        kv.allocate(more)


def test_pool_sizes_are_part_of_a_graph(session: Session) -> None:
    reader, batch = table(session), session.batch([decode()])
    session.read(reader, batch)
    compiler = session.backend.compiler
    known = next(iter(compiler.graphs))
    assert replace(known, leaves=()) != known
    assert (torch.Size(session.cache.keys[0].shape), torch.float32) in known.leaves
