"""From ids to text."""

import asyncio
from collections.abc import Sequence

import pytest

from chipset.backends.options import SamplingParams
from chipset.server.generation import Generator
from chipset.server.job import Job
from chipset.server.limits import Limits
from chipset.server.metrics import Metrics
from chipset.server.settings import ServerSettings

from .fakes import VOCAB, FakeDetokenizer, FakeEngine, FakeTokenizer


class Recorder(FakeTokenizer):
    """Remembers what its detokenizers were to go on from."""

    def detokenizer(self, *, prompt: Sequence[int] = ()) -> FakeDetokenizer:
        self.prompt = list(prompt)
        return FakeDetokenizer()


@pytest.mark.parametrize(("add_special_tokens", "expected"), [(True, [104, 105]), (False, [])])
def test_a_completion_goes_on_from_its_prompt_and_a_chat_answer_begins_anew(
    add_special_tokens: bool, expected: list[int]
) -> None:
    engine, tokenizer = FakeEngine(), Recorder()
    limits = Limits.derive(ServerSettings(), engine.ready, VOCAB)
    generator = Generator(engine, tokenizer, limits, Metrics(lambda: None, lambda: "model"))
    job = Job(
        prompt="hi", sampling=SamplingParams(), add_special_tokens=add_special_tokens, native=True
    )

    async def text() -> str:
        generation = await generator.prepare(job)
        return "".join([piece.text async for piece in generation.pieces()])

    assert asyncio.run(text()) == "Hello world"
    assert tokenizer.prompt == expected
