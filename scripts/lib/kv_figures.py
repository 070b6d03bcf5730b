"""What each dtype of the KV cache gives and costs, on the default model and the CPU: scripts/kv-cache.

Texts are drawn greedily with a cache of the model's dtype. Then each of their tokens is asked for again of a cache of
another dtype, after the same tokens before it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from chipset.backends.options import EngineOptions, SamplingParams
from chipset.core.conformance.traffic import Answer, Arrival, make_submit, serve
from chipset.core.engine import Engine
from chipset.core.files import ModelFiles
from chipset.core.loading.resolve import find_model
from chipset.core.messages import EngineLaunch
from chipset.core.startup import start_engine
from chipset.core.text.tokenizer import Tokenizer

PROMPTS = Path(__file__).parents[2] / "tests" / "e2e" / "prompts.json"
KV_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
BASE = "bfloat16"
"""What memory is compared with."""
KV_BYTES = 64 * 2**20
NUM_LOGPROBS = 20
FLOOR = -30.0
"""Taken for the logprob of a token that is not among the best: far too low, so that it shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Of one dtype of the cache."""

    kv_dtype: str
    kv_tokens: int
    agreement: float
    """Share of tokens that are the likeliest here too."""
    difference: float
    """Mean of |logprob here - logprob there| of the tokens drawn."""
    decode_rate: float
    """Tokens a second that eight streams draw together."""
    text: str
    """What it writes itself."""


@contextmanager
def running(files: ModelFiles, dtype: str, kv_dtype: str) -> Iterator[Engine]:
    """An engine on the CPU, whose whole cache has KV_BYTES."""
    options = EngineOptions(dtype=dtype, kv_dtype=kv_dtype, kv_bytes=KV_BYTES)
    launch = EngineLaunch(commands="", events="", files=files, backend="cpu", options=options)
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


def figures(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    wanted: Mapping[int, Answer],
    tokenizer: Tokenizer,
) -> Figures:
    """`wanted` are the answers to `prompts` that this cache is held to."""
    beginnings = [
        [*prompt, *wanted[number].ids[:at]]
        for number, prompt in enumerate(prompts)
        for at in range(len(wanted[number].ids))
    ]
    theirs = [token for number in range(len(prompts)) for token in wanted[number].tokens]
    found = answers(engine, beginnings, 1)
    equal, off = [], []
    for number, token in enumerate(theirs):
        mine = found[number].tokens[0]
        logprobs = dict(zip(mine.top_ids, mine.top_logprobs, strict=True))
        assert token.logprob is not None
        equal.append(mine.id == token.id)
        off.append(abs(logprobs.get(token.id, FLOOR) - token.logprob))
    num_new, began = 64, time.perf_counter()
    own = answers(engine, prompts[:8], num_new)
    rate = sum(len(answer.ids) for answer in own.values()) / (time.perf_counter() - began)
    return Figures(
        kv_dtype=engine.ready.kv_dtype,
        kv_tokens=engine.ready.kv_tokens,
        agreement=statistics.mean(equal),
        difference=statistics.mean(off),
        decode_rate=rate,
        text=tokenizer.decode(own[0].ids),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", help="of weights and activations")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32, help="drawn after each prompt")
    options = parser.parse_args()
    files = find_model(None)
    tokenizer = Tokenizer.load(files)
    texts = json.loads(PROMPTS.read_text())[: options.prompts]
    prompts = [tokenizer.encode(text) for text in texts]
    with running(files, options.dtype, options.dtype) as engine:
        wanted = answers(engine, prompts, options.tokens)
    rows = []
    for kv_dtype in KV_DTYPES:
        with running(files, options.dtype, kv_dtype) as engine:
            rows.append(figures(engine, prompts, wanted, tokenizer))
    base = next(row.kv_tokens for row in rows if row.kv_dtype == BASE)
    num_tokens = sum(len(answer.ids) for answer in wanted.values())
    print(
        f"{KV_BYTES / 2**20:.0f} MiB of cache; {num_tokens} tokens asked for again; model in {options.dtype}"
    )
    print(
        "| KV cache | tokens | times bfloat16's | same token | mean difference of logprobs | tokens/s |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.kv_dtype} | {row.kv_tokens} | {row.kv_tokens / base:.3f} | {row.agreement:.3f} | "
            f"{row.difference:.4f} | {row.decode_rate:.0f} |"
        )
    for row in rows:
        print(f"{row.kv_dtype}: {row.text!r}")


if __name__ == "__main__":
    main()
