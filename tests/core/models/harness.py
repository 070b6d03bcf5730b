"""Runs our decoder and Transformers' on one random checkpoint, and compares every logit.

Ours gets two sequences in one batch, paged: uneven chunks of the prompts, decode steps, and one step that mixes them;
blocks come shuffled and hold nan before they are written; blocks left of a window are taken away. Theirs gets each
sequence in one forward.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chipset.backends.backend import Backend
from chipset.backends.collectives import Collectives
from chipset.backends.formats import Scheme
from chipset.backends.kv_cache import KVBlob, KVPlan
from chipset.backends.options import EngineOptions, ModelSpec
from chipset.backends.plugin import Launch, WorkerSpec
from chipset.backends.quantization import Linear
from chipset.backends.runtime import Runtime
from chipset.backends.shapes import Bucket, Phase
from chipset.backends.step import SamplingBatch, StepBatch
from chipset.core.files import ModelFiles
from chipset.core.loading.weight_source import Part, WeightEntry, WeightSource
from chipset.core.loading.weights import open_weights
from chipset.core.models.build import build_decoder
from chipset.core.models.config import ModelConfig
from chipset.core.models.decoder import Decoder
from chipset.core.models.families import load_config
from chipset.core.models.shard import WHOLE, Shard
from chipset.core.models.spec import model_spec
from chipset.core.models.tensors import checkpoint_layout
from chipset.plugins.cpu.plugin import CPUPlugin

TOLERANCE = 1e-4
"""Of the largest logit."""
BLOCK_SIZE = 16
MAX_CONTEXT = 96
PROMPTS = (61, 43)
NUM_DECODE = 8
STEPS = ((7, 0), (13, 5), (1, 17), (25, 21), (15, 1), *((1, 1),) * (NUM_DECODE - 1), (1, 0))
"""Tokens of each text: chunks of the prompts, one of them beside the other's first decode step, then decode steps."""

Weights = Callable[[Iterator[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A saved random model and what Transformers computes with it."""

    folder: Path
    texts: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]
    """Per text: f32 [tokens, V]."""

    @property
    def config(self) -> ModelConfig:
        """As we read it."""
        return load_config(self.folder / "config.json")

    def source(self) -> WeightSource:
        """The folder's, as serving reads it."""
        files = ModelFiles(
            source=str(self.folder),
            name=self.folder.name,
            revision=None,
            config=self.folder / "config.json",
            tokenizer=self.folder / "tokenizer.json",
            tokenizer_config=None,
            chat_template=None,
            generation_config=None,
            weights=tuple(sorted(self.folder.glob("*.safetensors"))),
        )
        return open_weights(files)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the folder."""
        source = self.source()
        return ((name, source.read(name)) for name in source.names)


class TensorSource(WeightSource):
    """Tensors that lie in memory."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.tensors = dict(tensors)
        self.weights = {
            name: WeightEntry(
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                num_bytes=tensor.nbytes,
            )
            for name, tensor in self.tensors.items()
        }

    def read(self, name: str, part: Part = ()) -> Tensor:
        found = self.tensors[name][part]
        self.bytes_read += found.nbytes
        return found


def make_checkpoint(architecture: str, settings: Mapping[str, object], folder: Path) -> Checkpoint:
    """Save a model with std 0.5 weights and random norms and biases, and run it on two random texts."""
    import transformers

    torch.manual_seed(7)
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**settings, attn_implementation="eager")
    model = model_class(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = (
                "norm" in name and name.endswith("weight") and "gemma" not in config.model_type
            )
            parameter.normal_(1.0 if is_scale or "ln_f.weight" in name else 0.0, 0.5)
    model.save_pretrained(folder)
    draw = random.Random(11)
    texts = tuple(
        tuple(draw.randrange(config.vocab_size) for _ in range(length + NUM_DECODE))
        for length in PROMPTS
    )
    return Checkpoint(folder=folder, texts=texts, logits=their_logits(folder, texts, torch.float32))


def their_logits(
    folder: Path, texts: Sequence[Sequence[int]], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Transformers' logits of every token, one full forward for each text; f32 [tokens, V] each."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return tuple(
            model(torch.tensor([text]), use_cache=False).logits[0].float() for text in texts
        )


def difference(checkpoint: Checkpoint, logits: Sequence[Tensor]) -> float:
    """Largest difference over all tokens, as a share of the largest logit; inf where it is nan."""
    theirs = torch.cat(checkpoint.logits)
    worst = ((torch.cat(tuple(logits)) - theirs).abs().max() / theirs.abs().max()).item()
    return worst if worst == worst else float("inf")


def run(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: str = "float32",
    max_context: int = MAX_CONTEXT,
    weights: Weights = lambda stream: stream,
) -> tuple[Tensor, ...]:
    """Our logits of every token of every text, f32 [tokens, V] each."""
    session = Session(checkpoint, config, dtype=dtype, max_context=max_context, weights=weights)
    with torch.inference_mode():
        return session.run(checkpoint.texts)


class Session:
    """One model on the CPU plugin, with its cache and block tables."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        *,
        dtype: str = "float32",
        max_context: int = MAX_CONTEXT,
        weights: Weights = lambda stream: stream,
        shard: Shard = WHOLE,
        comm: Collectives | None = None,
        scheme: Scheme | None = None,
        linear: Callable[[Runtime], Linear] | None = None,
        source: WeightSource | None = None,
    ) -> None:
        self.spec = model_spec(config, dtype=dtype, max_context=max_context, shard=shard)
        self.backend = cpu_backend(self.spec)
        self.backend.comm = comm or self.backend.comm
        if linear is not None:
            self.backend.linear = linear(self.backend.runtime)
        layout = checkpoint_layout(config)
        known = layout.tensors.keys() | {
            layer.stack.tensor for layer in layout.layers.values() if layer.stack is not None
        }
        wanted = source or TensorSource(
            (name, tensor)
            for name, tensor in weights(checkpoint.weights())
            if layout.canonical(name) in known
        )
        with torch.inference_mode():
            built = build_decoder(
                config, self.spec, self.backend, wanted, shard=shard, scheme=scheme
            )
            self.model: Decoder = built.model
            self.report = built.report
            self.step = self.backend.compiler.wrap("model", self.model)
            self.tables, self.cache = self._allocate(num_rows=2, max_context=max_context)

    def _allocate(self, num_rows: int, max_context: int) -> tuple[list[list[list[int]]], object]:
        """Tables by group and row, and a cache full of nan."""
        per_row = -(-max_context // BLOCK_SIZE)
        num_blocks = 1 + num_rows * per_row
        groups = self.spec.groups
        cache = self.backend.kv.allocate(
            [KVPlan(group=group, num_blocks=num_blocks) for group in groups]
        )
        tables = []
        for number, group in enumerate(groups):
            ids = list(range(1, num_blocks))
            random.Random(number).shuffle(ids)
            tables.append([ids[row * per_row : (row + 1) * per_row] for row in range(num_rows)])
            tokens = num_blocks * BLOCK_SIZE
            nan = torch.full(
                (len(group.layers), tokens, group.num_kv_heads, group.head_size), float("nan")
            )
            blob = KVBlob(keys=nan, values=nan, heads=(0, group.num_kv_heads))
            every = np.arange(num_blocks, dtype=np.int32)
            cache = self.backend.kv.import_blocks(cache, number, every, blob)
        return tables, cache

    def run(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """All STEPS; logits of all tokens."""
        done = [0] * len(texts)
        found: list[list[Tensor]] = [[] for _ in texts]
        for counts in STEPS:
            batch = self.batch(texts, done, counts)
            logits, self.cache = self.step(self.backend.prepare(batch), self.cache)
            rows = in_order(done, counts)
            for row, part in zip(rows, torch.split(logits, [counts[r] for r in rows]), strict=True):
                found[row].append(part)
                done[row] += counts[row]
        assert done == [len(text) for text in texts]
        return tuple(torch.cat(parts) for parts in found)

    def batch(
        self, texts: Sequence[Sequence[int]], done: Sequence[int], counts: Sequence[int]
    ) -> StepBatch:
        """The next counts[row] tokens of each text, with a row of logits for every token."""
        rows = in_order(done, counts)
        num_decode_rows = sum(done[row] >= PROMPTS[row] for row in rows)
        ends = [done[row] + counts[row] for row in rows]
        num_tokens, width = sum(counts), -(-max(ends) // BLOCK_SIZE)
        at = [
            (row, index)
            for row, end in zip(rows, ends, strict=True)
            for index in range(done[row], end)
        ]
        phase = {0: Phase.PREFILL, len(rows): Phase.DECODE}.get(num_decode_rows, Phase.MIXED)
        bucket = Bucket(
            phase=phase,
            num_rows=len(rows),
            num_tokens=num_tokens,
            num_logits=num_tokens,
            max_query=max(counts),
            blocks_per_row=width,
        )
        sink = np.full(num_tokens, 2, np.int32)
        return StepBatch(
            bucket=bucket,
            num_rows=len(rows),
            num_decode_rows=num_decode_rows,
            num_tokens=num_tokens,
            num_logits=num_tokens,
            token_ids=np.array([texts[row][index] for row, index in at], np.int32),
            positions=np.array([[index for _, index in at]], np.int32),
            query_len=np.array([counts[row] for row in rows], np.int32),
            context_len=np.array(ends, np.int32),
            row_slot=np.array(rows, np.int32),
            block_table=self._block_tables(rows, done, width),
            logit_index=np.arange(num_tokens, dtype=np.int32),
            sampling=SamplingBatch(
                features=frozenset(), slot=sink, position=np.zeros(num_tokens, np.int32)
            ),
        )

    def _block_tables(
        self, rows: Sequence[int], done: Sequence[int], width: int
    ) -> list[NDArray[np.int32]]:
        """Per group, without the blocks left of its window."""
        tables = []
        for group, table in zip(self.spec.groups, self.tables, strict=True):
            held = np.array([table[row][:width] for row in rows], np.int32)
            for place, row in enumerate(rows):
                first = 0 if group.window is None else max(0, done[row] - group.window + 1)
                held[place, : first // BLOCK_SIZE] = 0
            tables.append(held)
        return tables


def in_order(done: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Rows that bring tokens, decode rows first."""
    rows = [row for row, count in enumerate(counts) if count]
    return sorted(rows, key=lambda row: done[row] < PROMPTS[row])


def cpu_backend(spec: ModelSpec) -> Backend:
    """The CPU plugin's, in the dtype of `spec`."""
    plugin = CPUPlugin()
    capabilities = plugin.capabilities(plugin.probe())
    asked = EngineOptions(dtype=spec.dtype, block_size=BLOCK_SIZE, max_batch_rows=2)
    options = plugin.resolve(asked, spec, capabilities)
    backend = plugin.create(
        Launch(
            plugin="cpu",
            worker=WorkerSpec(rank=0, local_rank=0, host=0, devices=(0,)),
            world_size=1,
            rendezvous="",
            groups={"tensor": (0,)},
            capabilities=capabilities,
            options=options,
            model=spec,
            shapes=plugin.shapes(options, spec),
        )
    )
    torch.set_num_threads(1)  # models this small only lose by more
    return backend
