"""Texts and memory of several ranks beside one rank's: scripts/ranks.

Texts are compared in float32, token by token, by the rule of core/conformance/ties.py. In bfloat16 and int8 they are
not: there each token of one rank's text is asked for again, after the same tokens before it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from quantised_models import default_model, plain

from chipset.backends.options import EngineOptions, ParallelOptions, SamplingParams
from chipset.core.conformance.checkpoint import MOE, make_checkpoint
from chipset.core.conformance.ties import Comparison
from chipset.core.conformance.traffic import Answer, Arrival, make_submit, serve
from chipset.core.engine import Engine
from chipset.core.files import ModelFiles
from chipset.core.loading.resolve import find_model
from chipset.core.messages import EngineLaunch, Ready
from chipset.core.startup import start_engine
from chipset.core.text.tokenizer import Tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "ranks.md"
NUM_LOGPROBS = 20
FLOOR = -30.0
"""Taken for the logprob of a token that is not among the best: far too low, so that it shows."""
MAX_CONTEXT = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One model on one backend, cut into so many ranks."""

    backend: str
    model: str
    files: ModelFiles
    prompts: Sequence[Sequence[int]]
    num_ranks: int = 1
    dtype: str = "float32"
    quantize: str | None = None


@contextmanager
def running(case: Case) -> Iterator[Engine]:
    """An engine of that case, and its workers."""
    options = EngineOptions(
        dtype=case.dtype,
        max_context=MAX_CONTEXT,
        max_batch_rows=16,
        parallel=ParallelOptions(tensor=case.num_ranks),
    )
    launch = EngineLaunch(
        commands="",
        events="",
        files=case.files,
        backend=case.backend,
        options=options,
        quantize=case.quantize,
    )
    engine = start_engine(launch, lambda *_: None)
    try:
        yield engine
    finally:
        engine.close()


def answers(engine: Engine, prompts: Sequence[Sequence[int]], num_new: int) -> dict[int, Answer]:
    """Greedy, all prompts at once."""
    sampling = SamplingParams(num_logprobs=NUM_LOGPROBS)
    return serve(
        engine,
        [Arrival(submit=make_submit(n, p, num_new, sampling)) for n, p in enumerate(prompts)],
    )


def sentences(count: int) -> list[str]:
    """Beginnings of paragraphs of Python's own documentation."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    found = [" ".join(part.split()[:14]) for part in re.split(r"\n\s*\n", text)]
    long = [part for part in found if len(part) > 60 and part[0].isalpha()]
    return long[:: len(long) // count][:count]


def equality(one: Mapping[int, Answer], many: Mapping[int, Answer], case: Case) -> Comparison:
    """By the rule; one rank's own logprobs tell how near a tie was."""

    def gap(text: Sequence[int]) -> float:
        for number, prompt in enumerate(case.prompts):
            if list(prompt) == list(text[: len(prompt)]):
                best = one[number].tokens[len(text) - len(prompt)].top_logprobs
                return best[0] - best[1]
        raise ValueError("no such prompt")

    comparison = Comparison(gap)
    for number, prompt in enumerate(case.prompts):
        comparison.add(str(number), prompt, many[number].ids, one[number].ids)
    return comparison


def forced(engine: Engine, case: Case, one: Mapping[int, Answer]) -> tuple[float, float]:
    """Share of one rank's tokens that are also the likeliest here, and the mean difference of their logprobs."""
    texts = [
        [*prompt, *one[number].ids[:at]]
        for number, prompt in enumerate(case.prompts)
        for at in range(len(one[number].ids))
    ]
    theirs = [token for number in range(len(case.prompts)) for token in one[number].tokens]
    found = answers(engine, texts, 1)
    equal, off = [], []
    for number, token in enumerate(theirs):
        mine = found[number].tokens[0]
        logprobs = dict(zip(mine.top_ids, mine.top_logprobs, strict=True))
        assert token.logprob is not None
        equal.append(mine.id == token.id)
        off.append(abs(logprobs.get(token.id, FLOOR) - token.logprob))
    return statistics.mean(equal), statistics.mean(off)


def memory_row(case: Case, one: Ready, many: Ready) -> str:
    """Bytes of parameters that each rank holds, beside one rank's."""
    share = max(many.rank_weight_bytes) / one.weight_bytes
    bound = 1 / case.num_ranks + 0.05
    held = ", ".join(f"{size / 2**20:.1f}" for size in many.rank_weight_bytes)
    return (
        f"| {case.backend} | {case.model} | {case.quantize or case.dtype} | {case.num_ranks} | "
        f"{one.weight_bytes / 2**20:.1f} | {held} | {share:.3f} | {bound:.3f} |"
    )


def equal_rows(cases: Sequence[Case], num_new: int) -> tuple[list[str], list[str]]:
    """Rows of texts and rows of memory; raises AssertionError where a text is wrong."""
    texts, memory = [], []
    for case in cases:
        alone = Case(backend="cpu", model=case.model, files=case.files, prompts=case.prompts)
        with running(alone) as engine:
            one, ready = answers(engine, case.prompts, num_new), engine.ready
        with running(case) as engine:
            comparison = equality(one, answers(engine, case.prompts, num_new), case)
            memory.append(memory_row(case, ready, engine.ready))
        comparison.check()
        texts.append(f"| {case.backend} | {case.model} | {case.num_ranks} | {comparison} |")
        print(texts[-1], memory[-1], sep="\n", flush=True)
    return texts, memory


def forced_rows(cases: Sequence[Case], num_new: int) -> tuple[list[str], list[str]]:
    """Rows of agreement and rows of memory."""
    rows, memory = [], []
    for case in cases:
        alone = Case(
            backend=case.backend,
            model=case.model,
            files=case.files,
            prompts=case.prompts,
            dtype=case.dtype,
            quantize=case.quantize,
        )
        with running(alone) as engine:
            one, ready = answers(engine, case.prompts, num_new), engine.ready
        with running(case) as engine:
            share, off = forced(engine, case, one)
            memory.append(memory_row(case, ready, engine.ready))
        rows.append(
            f"| {case.backend} | {case.model} | {case.quantize or case.dtype} | "
            f"{case.num_ranks} | {100 * share:.1f} % | {off:.4f} |"
        )
        print(rows[-1], memory[-1], sep="\n", flush=True)
    return rows, memory


PAGE_TEXT = """# Several ranks beside one

Written by `scripts/ranks` on {date}, {cpus} cores of a shared machine without an accelerator, at commit {commit}. The
simulators run our own stand-in for a device: they prove the engine and the contract, no vendor's collectives.

## Texts

Greedy, float32, {prompts} prompts at once, {tokens} new tokens each, against one rank on cpu. A difference is excused
only where one rank's two best logprobs differ by less than 1e-3, for at most one text.

| backend | model | ranks | texts |
|---|---|---|---|
{texts}

## bfloat16 and int8

Each token of one rank's greedy text is asked for again, after the same tokens before it: how often it is the likeliest
again, and by how much its logprob differs on average.

| backend | model | weights | ranks | the same token | mean difference of logprobs |
|---|---|---|---|---|---|
{forced}

## Parameters held

MiB, every storage counted once, padding and repacked copies included, as `/info` says. The bound is 1 / ranks + 0.05.

| backend | model | weights | ranks | one rank | each rank | largest share | bound |
|---|---|---|---|---|---|---|---|
{memory}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=16)
    asked = parser.parse_args()
    packed = find_model(None)
    tokenizer = Tokenizer.load(packed)
    prompts = [tokenizer.encode(text) for text in sentences(asked.prompts)]
    random_ids = [[7 * n % 380, (11 * n + 5) % 380, *range(n, n + 9)] for n in range(asked.prompts)]
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "SmolLM2-135M, Q4_1": (packed, prompts),
            "SmolLM2-135M": (plain().write(default_model(), Path(folder)).files, prompts),
            "random MoE": (make_checkpoint(MOE, Path(folder) / "moe"), random_ids),
        }

        def case(backend: str, model: str, num_ranks: int, dtype: str, way: str | None) -> Case:
            files, texts = models[model]
            return Case(
                backend=backend,
                model=model,
                files=files,
                prompts=texts,
                num_ranks=num_ranks,
                dtype=dtype,
                quantize=way,
            )

        equal = [
            *(("cpu", "SmolLM2-135M", count) for count in (2, 4)),
            ("cpu", "SmolLM2-135M, Q4_1", 2),
            *(("cpu", "random MoE", count) for count in (2, 4)),
            *((f"sim-{name}", "SmolLM2-135M", 2) for name in ("gpu", "gaudi")),
            *((f"sim-{name}", "random MoE", 2) for name in ("gpu", "gaudi")),
        ]
        texts, memory = equal_rows([case(*one, "float32", None) for one in equal], asked.tokens)
        narrow = [(2, None), (4, None), (2, "int8")]
        agreed, more = forced_rows(
            [case("cpu", "SmolLM2-135M", count, "bfloat16", way) for count, way in narrow],
            asked.tokens,
        )
    PAGE.write_text(
        PAGE_TEXT.format(
            date=dt.datetime.now(dt.UTC).date(),
            cpus=os.cpu_count(),
            commit=os.popen("git rev-parse --short HEAD").read().strip(),
            prompts=asked.prompts,
            tokens=asked.tokens,
            texts="\n".join(texts),
            forced="\n".join(agreed),
            memory="\n".join([*memory, *more]),
        )
    )


if __name__ == "__main__":
    main()
