"""The engine on a backend, against the engine on cpu: the same text, and no more waits or compiles than allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from ...backends.capabilities import Capabilities
from ...backends.errors import ChipsetError
from ...backends.options import EngineOptions, SamplingParams
from ...backends.plugin import Plugin
from ...backends.registry import Registry
from ...backends.step import StepBatch
from ..engine import Engine
from ..files import ModelFiles
from ..loading.resolve import find_model
from ..text.tokenizer import Tokenizer
from .checkpoint import FULL, NAN_TOKEN, WINDOWED, make_checkpoint
from .engines import compare, one_thread, running
from .ranks import RankConformance
from .traffic import Answer, Arrival, make_submit, random_traffic, serve
from .witness import WitnessedPlugin

Record = Callable[[str, object], None]
"""pytest's record_property: figures go into the report."""
MAX_CONTEXT = 256
KV_TOKENS = 768
"""Three of the longest texts, while up to eight run."""
PREEMPT_EVERY = 12
"""Steps after which a request is put back, blocks or no blocks, where that is served."""
STEP_TOKENS = 64
"""Where prompts may be cut: long ones then take steps that draw nothing."""
MARKED_TOKEN = NAN_TOKEN - 1
"""A test backend raises where it sees this one."""
NUM_POISONED = 16
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "The largest planet of the solar system is",
    "My favourite colour is blue because",
    "List three fruits:",
    "In 1969, people first walked on",
)


class InjectedFault(RuntimeError):
    """What a test makes a step raise."""


class EngineConformance(RankConformance):
    """End to end: greedy text is equal to cpu's, whatever else runs."""

    model: ClassVar[str | None] = None
    """Name of the real model; None is the default one."""
    num_requests: ClassVar[int] = 200

    def reference(self) -> Plugin:
        """Whose text is right."""
        return Registry.discover().select("cpu").plugin

    @pytest.mark.parametrize("kind", ["full", "windowed"])
    def test_random_traffic_gives_the_text_of_cpu(
        self,
        kind: str,
        plugin: Plugin,
        capabilities: Capabilities,
        tmp_path: Path,
        record_property: Record,
    ) -> None:
        """Mixed lengths, shared prefixes, clients that leave, blocks that run out."""
        files = self.checkpoint(kind, capabilities, tmp_path)
        count = self.num_requests // 5 if self.is_quick else self.num_requests
        arrivals = random_traffic(
            count, vocab_size=MARKED_TOKEN, max_prompt=150, max_new=24, seed=5
        )
        theirs = self.serve(self.reference(), files, arrivals)
        witnessed = WitnessedPlugin(plugin)
        ours = self.serve(witnessed, files, arrivals)
        comparison = compare(arrivals, ours, theirs)
        record_property("figures", f"{comparison}; {witnessed.witness}")
        comparison.check()
        witnessed.witness.assert_clean()

    def test_drawn_text_and_logprobs_follow_cpu(
        self, plugin: Plugin, capabilities: Capabilities, tmp_path: Path
    ) -> None:
        """A seed gives the same draws on every backend, up to rounding: nine texts of ten must be equal."""
        self.require("sampled" in capabilities.features, "sampled: not claimed")
        files = self.checkpoint("full", capabilities, tmp_path)
        arrivals = [
            Arrival(submit=make_submit(n, range(7 * n, 7 * n + 5), 20, sampling), step=n // 3)
            for n, sampling in enumerate(sampling_mixture(capabilities, 20))
        ]
        theirs = self.serve(self.reference(), files, arrivals)
        witnessed = WitnessedPlugin(plugin)
        ours = self.serve(witnessed, files, arrivals)
        witnessed.witness.assert_clean()
        equal = [n for n in ours if ours[n].ids == theirs[n].ids]
        assert len(equal) >= 0.9 * len(arrivals), f"only {len(equal)} of {len(arrivals)} equal"
        for n in equal:
            for mine, yours in zip(ours[n].tokens, theirs[n].tokens, strict=True):
                assert (mine.logprob is None) == (yours.logprob is None)
                if mine.logprob is not None and yours.logprob is not None:
                    assert math.isclose(mine.logprob, yours.logprob, abs_tol=1e-2)

    @pytest.mark.parametrize("fault", ["nan prompt", "nan output", "before", "after"])
    def test_a_poisoned_request_ends_alone(
        self,
        fault: str,
        plugin: Plugin,
        capabilities: Capabilities,
        tmp_path: Path,
        record_property: Record,
    ) -> None:
        """One of 16 gives nan logits, or makes the step raise before or after the device ran it.

        A nan in the prompt shows in the first logits; one that is drawn meets the other rows in a decode step.
        """
        has_nan = fault.startswith("nan")
        files = self.checkpoint("full", capabilities, tmp_path, has_nan=has_nan)
        prompts = {n: list(range(11 * n, 11 * n + 6 + n % 5)) for n in range(NUM_POISONED)}
        healthy = [Arrival(submit=make_submit(n, p, 12)) for n, p in prompts.items()]
        theirs = self.serve(self.reference(), files, healthy)
        bad = 9
        sampling = dict.fromkeys(prompts, SamplingParams(num_logprobs=2))
        if fault == "nan output":
            self.require("bias" in capabilities.features, "bias: not claimed")
            sampling[bad] = SamplingParams(logit_bias={NAN_TOKEN: 1e4})
        else:
            prompts[bad].append(NAN_TOKEN if has_nan else MARKED_TOKEN)
        arrivals = [Arrival(submit=make_submit(n, p, 12, sampling[n])) for n, p in prompts.items()]

        def raises(batch: StepBatch) -> Exception | None:
            return InjectedFault() if MARKED_TOKEN in batch.token_ids else None

        witnessed = WitnessedPlugin(plugin)
        if fault == "before":
            witnessed.witness.fault_before = raises
        if fault == "after":
            witnessed.witness.fault_after = raises
        with self.running(witnessed, files) as engine:
            meaning = engine.runner.classify(InjectedFault())
            self.require(
                has_nan or meaning == "request",
                f"the backend takes an error that it does not know for {meaning}",
            )
            ours = serve(engine, arrivals)
        assert ours[bad].finish_reason == "error"
        assert ours[bad].error
        comparison = compare([a for a in healthy if a.submit.request_id != bad], ours, theirs)
        record_property("figures", str(comparison))
        comparison.check()

    def test_the_real_model_gives_the_text_of_cpu(
        self, plugin: Plugin, capabilities: Capabilities, record_property: Record
    ) -> None:
        """Eight prompts, 32 tokens each, at once."""
        self.thorough()
        self.require("float32" in capabilities.dtypes, "float32: not claimed")
        try:
            files = find_model(self.model)
        except ChipsetError as error:
            pytest.skip(f"no model: {error}")
        tokenizer = Tokenizer.load(files)
        arrivals = [
            Arrival(submit=make_submit(n, tokenizer.encode(prompt), 32))
            for n, prompt in enumerate(PROMPTS)
        ]
        options = EngineOptions(
            dtype="float32", max_context=MAX_CONTEXT, max_batch_rows=8, kv_bytes=256 * 2**20
        )
        with running(self.reference(), files, options) as engine:
            theirs = serve(engine, arrivals)
        witnessed = WitnessedPlugin(plugin)
        with running(witnessed, files, options) as engine:
            witnessed.witness.follow(engine)
            ours = serve(engine, arrivals)
        comparison = compare(arrivals, ours, theirs)
        record_property("figures", f"{comparison}; {witnessed.witness}")
        comparison.check()
        witnessed.witness.assert_clean()

    def checkpoint(
        self, kind: str, capabilities: Capabilities, folder: Path, *, has_nan: bool = False
    ) -> ModelFiles:
        """A tiny random model, where the backend claims what it needs."""
        self.require("float32" in capabilities.dtypes, "float32: not claimed")
        self.require(
            kind == "full" or "window" in capabilities.attention, "sliding windows: not claimed"
        )
        kinds = {"full": FULL, "windowed": WINDOWED}
        return make_checkpoint(kinds[kind], folder / kind, has_nan=has_nan)

    @contextmanager
    def running(self, plugin: Plugin, files: ModelFiles) -> Iterator[Engine]:
        """An engine for a tiny model, short of blocks, every step checked where there is a witness."""
        token_bytes = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head size, float32
        capabilities = plugin.capabilities(plugin.probe())
        options = EngineOptions(
            dtype="float32",
            max_context=MAX_CONTEXT,
            max_batch_tokens=STEP_TOKENS if capabilities.chunked_prefill else None,
            max_batch_rows=8,
            kv_bytes=KV_TOKENS * token_bytes,
        )
        with running(plugin, files, options) as engine, one_thread():
            if isinstance(plugin, WitnessedPlugin):
                plugin.witness.follow(engine)
                # the reference goes without: what is put back must not change its text
                engine.preempt_every = PREEMPT_EVERY if capabilities.preemption else 0
            yield engine

    def serve(
        self, plugin: Plugin, files: ModelFiles, arrivals: Sequence[Arrival]
    ) -> Mapping[int, Answer]:
        """What the requests get from an engine of their own."""
        with self.running(plugin, files) as engine:
            answers = serve(engine, arrivals)
            if isinstance(plugin, WitnessedPlugin):
                plugin.witness.num_preemptions = engine.stats().preemptions
            return answers


def sampling_mixture(capabilities: Capabilities, count: int) -> list[SamplingParams]:
    """Seeds, filters, penalties and logprobs in turn, as far as they are claimed."""
    claimed = capabilities.features
    mixture = []
    for n in range(count):
        wishes: dict[str, dict[str, object]] = {
            "filters": {"top_k": 20, "top_p": 0.9} if n % 3 == 1 else {},
            "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4} if n % 4 == 2 else {},
            "logprobs": {"num_logprobs": 3} if n % 2 else {},
            "bias": {"logit_bias": {5: 4.0, 9: -4.0}} if n % 5 == 3 else {},
        }
        granted = {
            k: v for name, wish in wishes.items() if name in claimed for k, v in wish.items()
        }
        mixture.append(SamplingParams(temperature=0.8, seed=2**33 + n, **granted))  # type: ignore[arg-type]
    return mixture
