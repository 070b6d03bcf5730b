"""docs/quantization.md: what each format does to a model's logits and to its perplexity, on the CPU, in float32."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from forced_logits import ForcedModel
from quantised_models import (
    Format,
    PlainModel,
    default_model,
    formats,
    largest_inputs,
    small_model,
    transformers_logits,
    transformers_model,
)
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from chipset.core.loading.cache import Cache
from chipset.core.loading.resolve import find_model
from chipset.core.loading.weights import open_weights
from chipset.core.models.families import load_config
from chipset.core.models.report import WeightReport
from chipset.core.text.tokenizer import Tokenizer
from chipset.core.worker import scheme_of
from chipset.server.tables import markdown

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quantization.md"
WINDOW = 512
"""Tokens that are computed together, each after those before it."""
NUM_PROBES = 256
"""Tokens of the text whose logits are compared with the oracle's."""
SOURCES = ("core/layers", "core/models", "core/quantization", "plugins/cpu")
"""What a figure depends on: one that was measured with other code is measured again."""
COLUMNS = ("format", "on the CPU", "error", "of largest", "perplexity", "× plain", "MiB held")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A row."""

    name: str
    kernels: str
    error: float
    """Of a logit, at most."""
    largest_logit: float
    held_bytes: int
    perplexity: float | None
    """None: the model's texts mean nothing."""
    num_scored: int
    seconds: float
    values: str
    """Digest of what the weights are worth."""


def text_ids() -> Sequence[int]:
    """The topics of Python's own help, in the words of the default model."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return Tokenizer.load(find_model(None)).encode(text)


def measure(
    model: PlainModel,
    form: Format,
    probes: Sequence[int],
    ids: Sequence[int],
    known: Callable[[str], Measured | None],
) -> Measured:
    """`ids` are scored; where there are none, there is no perplexity. `known`: who was worth the same, by digest."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        quantised = form.write(model, Path(folder))
        files = quantised.files
        scheme = scheme_of(files, quantised.quantize, ())
        config, source = load_config(files.config), open_weights(files)
        ours = ForcedModel(config, source, scheme, window=WINDOW)
        theirs = transformers_logits(transformers_model(model.config, quantised.values), probes)
        error = (ours.logits(probes) - theirs).abs().max().item()
        values = digest(quantised.values)
        same = known(values)
        found = ours.perplexity(ids) if ids and same is None else None
        ours.close()
    return Measured(
        name=form.name,
        kernels=kernels(ours.report),
        error=error,
        largest_logit=theirs.abs().max().item(),
        held_bytes=ours.report.held_bytes,
        perplexity=same.perplexity if same else found.value if found else None,
        num_scored=same.num_scored if same else found.num_tokens if found else 0,
        seconds=time.perf_counter() - start,
        values=values,
    )


def digest(values: Mapping[str, Tensor]) -> str:
    """Of names and numbers."""
    found = hashlib.sha256()
    for name in sorted(values):
        found.update(name.encode())
        found.update(values[name].float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def kernels(report: WeightReport) -> str:
    """What became of the layers that are packed."""
    native = [f"native, {name}" for name in report.kernels if not name.startswith("plain")]
    lost = [f"dequantised: {reason}" for reason in report.dequantised]
    return "; ".join([*native, *lost]) or "plain"


class Results:
    """Rows that are kept between runs, by all that they depend on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = json.loads(path.read_text()) if path.exists() else {}
        digest = hashlib.sha256(torch.__version__.encode())
        for folder in SOURCES:
            for source in sorted((ROOT / folder).rglob("*.py")):
                digest.update(source.read_bytes())
        self._digest = digest.hexdigest()

    def find(self, key: str) -> Measured | None:
        row = self._rows.get(self._key(key))
        return None if row is None else Measured(**row)

    def add(self, key: str, row: Measured) -> None:
        self._rows[self._key(key)] = asdict(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._rows, indent=1))

    def _key(self, key: str) -> str:
        return f"{key} | {self._digest[:16]}"


def rows_of(
    model: PlainModel,
    group_size: int,
    probes: Sequence[int],
    ids: Sequence[int],
    results: Results,
    only: str,
) -> Iterator[Measured]:
    """All formats of a model; each is told when it is there."""

    @cache
    def largest() -> Mapping[str, float]:
        return largest_inputs(transformers_model(model.config, model.tensors), probes)

    measured: dict[str, Measured] = {}
    for form in formats(group_size, largest):
        if only not in form.name:
            continue
        key = f"{model.name} | {form.name} | {len(ids)}"
        row = results.find(key)
        if row is None:
            row = measure(model, form, probes, ids, measured.get)
            results.add(key, row)
            print(f"{row.seconds:7.0f} s  {row}", flush=True)
        measured.setdefault(row.values, row)
        yield row


def table(rows: Sequence[Measured]) -> str:
    """In Markdown."""
    plain = next((row.perplexity for row in rows if row.name == "plain"), None)
    return markdown(
        COLUMNS,
        [
            (
                row.name,
                row.kernels,
                f"{row.error:.1e}",
                f"{row.error / row.largest_logit:.1e}",
                "" if row.perplexity is None else f"{row.perplexity:.2f}",
                "" if row.perplexity is None or not plain else f"{row.perplexity / plain:.3f}",
                f"{row.held_bytes / 2**20:.1f}",
            )
            for row in rows
        ],
    )


def page(default: Sequence[Measured], small: Sequence[Measured], names: Sequence[str]) -> str:
    """The whole of it."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    scored = max((row.num_scored for row in default), default=0)
    return f"""\
# Quantization

What each format of weights does to a model on the `cpu` backend. `scripts/quantization-table` measures it and writes
this page; `chipset matrix` says which backend multiplies by packed weights and which dequantises them at load.

Measured at {commit} on {platform.machine()} ({torch.backends.cpu.get_cpu_capability()}) with torch {torch.__version__},
model and cache in float32, so that nothing but the weights differs.

- *Written* by `tests/quantizers.py`, which rounds to the nearest number of each layout and knows what its numbers are
  worth; GGUF's blocks by the `gguf` package. Rounding to the nearest is the least that a format can do: checkpoints
  that were made with AWQ's or GPTQ's own search are better.
- *The error* is the largest difference of any logit over {NUM_PROBES} tokens from those of Transformers, which is given
  the numbers that the writer meant, in float32, in plain layers; beside it the same as a share of the largest logit.
- *Perplexity* is that of {scored:,} tokens of Python's own help (`pydoc_data.topics`) in windows of {WINDOW}, measured
  once where the weights of several formats are worth the same numbers.
- *MiB held* counts every parameter, embeddings and tables of positions too.

## {names[0]}

The file that this model comes in holds blocks of Q4_1. `plain` is what they are worth, and the other formats are made
of that: Q4_1 finds its own numbers again.

{table(default)}

## {names[1]}

Two layers whose sizes are multiples of 256, for groups of 128.

{table(small)}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=50_000, help="that are scored, at least")
    parser.add_argument("--only", default="", help="formats whose names hold this")
    parser.add_argument("--dry", action="store_true", help="print the page instead of writing it")
    options = parser.parse_args()
    disable_progress_bar()
    results = Results(Cache.default().root / "quantization-table.json")
    ids = text_ids()
    scored = ids[: -(-options.tokens // (WINDOW - 1)) * WINDOW]
    default, small = default_model(), small_model()
    ours = list(rows_of(default, 64, ids[:NUM_PROBES], scored, results, options.only))
    probes = [number % len(small.tensors["lm_head.weight"]) for number in ids[:NUM_PROBES]]
    theirs = list(rows_of(small, 128, probes, (), results, options.only))
    text = page(ours, theirs, (default.name, small.name[0].upper() + small.name[1:]))
    if options.dry or options.only:
        print(text)
    else:
        PAGE.write_text(text)
        print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
