"""The whole engine on each simulator: the text of the CPU backend, no graph after warm-up, one wait a step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from chipset.backends.options import EngineOptions, SamplingParams
from chipset.backends.registry import Registry
from chipset.backends.step import StepBatch, StepOutput
from chipset.core.engine import Engine
from chipset.core.files import ModelFiles
from chipset.core.messages import EngineLaunch, Submit
from chipset.core.startup import start_engine
from chipset.plugins.sim import watch

from .sims import SIMS

NUM_REQUESTS = 20


def start(folder: Path, backend: str, **options: object) -> Engine:
    files = ModelFiles(
        source=str(folder),
        name=folder.name,
        revision=None,
        config=folder / "config.json",
        tokenizer=folder / "tokenizer.json",
        tokenizer_config=None,
        chat_template=None,
        generation_config=None,
        weights=tuple(sorted(folder.glob("*.safetensors"))),
    )
    asked = EngineOptions(**({"dtype": "float32", "max_batch_rows": 8} | options))
    launch = EngineLaunch(commands="", events="", files=files, backend=backend, options=asked)
    return start_engine(launch, lambda *_: None, Registry.discover().select(backend))


def requests(sampling: Sequence[SamplingParams]) -> list[Submit]:
    """Mixed lengths, some with a common beginning."""
    draw = random.Random(5)
    common = [draw.randrange(199) for _ in range(140)]
    found = []
    for number in range(NUM_REQUESTS):
        own = [draw.randrange(199) for _ in range(draw.randrange(1, 60))]
        found.append(
            Submit(
                request_id=number,
                prompt=common[: draw.choice([0, 40, 140])] + own,
                sampling=sampling[number % len(sampling)],
                max_new_tokens=draw.randrange(1, 24),
                stop_ids=[],
            )
        )
    return found


def serve(engine: Engine, submits: Sequence[Submit]) -> dict[int, list[int]]:
    """The texts; a request comes with every step, and none of them fails."""
    waiting, texts = list(submits), {submit.request_id: list[int]() for submit in submits}
    while waiting or not engine.is_idle:
        for submit in waiting[:2]:
            engine.submit(submit)
        waiting = waiting[2:]
        for tokens in engine.step():
            assert tokens.error is None
            texts[tokens.request_id] += [token.id for token in tokens.tokens]
        engine.check()
    return texts


GREEDY = (SamplingParams(),)
MIXTURE = (
    SamplingParams(),
    SamplingParams(temperature=0.9, seed=3, top_p=0.9, top_k=50, min_p=0.01, typical_p=0.95),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1),
    SamplingParams(logit_bias={5: 4.0, 9: -1e30}, num_logprobs=3),
)


@pytest.fixture(scope="module")
def texts_of_cpu(tiny_llama: Path) -> list[dict[int, list[int]]]:
    return [serve(start(tiny_llama, "cpu"), requests(sampling)) for sampling in (GREEDY, MIXTURE)]


@pytest.mark.parametrize("backend", SIMS)
def test_the_text_is_that_of_the_cpu_with_no_graph_after_warm_up(
    backend: str, tiny_llama: Path, texts_of_cpu: list[dict[int, list[int]]]
) -> None:
    engine = start(tiny_llama, backend)
    assert engine.ready.backend == backend
    counters = engine.runner.backend.telemetry.counters()
    refused = watch.counts().refused
    assert counters["compiles"] > 0
    assert serve(engine, requests(GREEDY)) == texts_of_cpu[0]
    assert serve(engine, [renumbered(s) for s in requests(MIXTURE)]) == {
        number + NUM_REQUESTS: text for number, text in texts_of_cpu[1].items()
    }
    assert engine.runner.backend.telemetry.counters() == counters
    assert watch.counts().refused == refused
    engine.close()


def renumbered(submit: Submit) -> Submit:
    return Submit(
        **{name: getattr(submit, name) for name in submit.__struct_fields__}
        | {"request_id": submit.request_id + NUM_REQUESTS}
    )


@pytest.mark.parametrize("backend", SIMS)
def test_a_step_costs_one_copy_a_dtype_and_reads_in_its_result_alone(
    backend: str, tiny_llama: Path
) -> None:
    engine = start(tiny_llama, backend)
    step = engine.runner.step
    drawing, silent = [], []

    def watched(batch: StepBatch, resets: object = ()) -> StepOutput | None:
        for reset in resets:
            engine.runner.reset(reset)
        before = watch.counts()
        output = step(batch)
        (drawing if batch.num_logits else silent).append(watch.counts() - before)
        return output

    engine.runner.step = watched
    submits = requests(GREEDY)
    serve(engine, [with_prompt(submits[0], list(range(180)) + [3] * 40), *submits[1:6]])
    for seen in (*drawing, *silent):
        assert set(seen.uploads_by_dtype.values()) == {1}
        assert seen.synchronizes == 0
    assert {seen.reads for seen in drawing} == {2}, "ids and finite"
    assert {seen.reads for seen in silent} <= {0}
    chunked = engine.runner.launch.capabilities.chunked_prefill
    assert bool(silent) == (chunked and engine.runner.launch.options.max_batch_tokens < 220)
    engine.close()


def with_prompt(submit: Submit, prompt: list[int]) -> Submit:
    fields = {name: getattr(submit, name) for name in submit.__struct_fields__}
    return Submit(**fields | {"prompt": prompt})


@pytest.mark.parametrize("backend", ["sim-gpu", "sim-tpu"])
def test_scarce_blocks_put_requests_back_and_change_no_text(
    backend: str, tiny_llama: Path, texts_of_cpu: list[dict[int, list[int]]]
) -> None:
    engine = start(tiny_llama, backend, max_context=256)
    blocks = engine.ready.kv_tokens // engine.ready.block_size
    small = start(
        tiny_llama,
        backend,
        max_context=256,
        kv_bytes=(1 + blocks // 2) * engine.runner.block_bytes()[0],
    )
    engine.close()
    assert serve(small, requests(GREEDY)) == texts_of_cpu[0]
    assert small.stats().preemptions > 0
    small.close()


def test_a_device_that_cannot_preempt_never_does(
    tiny_llama: Path, texts_of_cpu: list[dict[int, list[int]]]
) -> None:
    engine = start(tiny_llama, "sim-neuron", max_context=256)
    bytes_of_two = (1 + 2 * 8) * engine.runner.block_bytes()[0]
    engine.close()
    small = start(tiny_llama, "sim-neuron", max_context=256, kv_bytes=bytes_of_two)
    assert serve(small, requests(GREEDY)) == texts_of_cpu[0]
    assert small.stats().preemptions == 0
    small.close()
