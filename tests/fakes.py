"""Stand-ins that run without a device: a memory that remembers what was written where, and a plugin around it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from chipset.backends.capabilities import Capabilities
from chipset.backends.errors import TooLarge
from chipset.backends.options import (
    AttentionSpec,
    EngineOptions,
    KVGroup,
    ModelSpec,
    ParallelOptions,
    ResolvedOptions,
)
from chipset.backends.plugin import API_VERSION, Launch, Plugin, PluginInfo, Probe, WorkerSpec
from chipset.backends.shapes import BatchPolicy, BatchShape, Bucket, DynamicShapes, ShapePolicy
from chipset.backends.step import I32, StepBatch, StepOutput, slot_mapping, token_index, token_row
from chipset.core.batch import BatchBuilder
from chipset.core.engine import Engine
from chipset.core.kv_cache.manager import KVCacheManager
from chipset.core.messages import Ready, Submit
from chipset.core.scheduler import Scheduler

VOCAB_SIZE = 1000


def next_token(text: Sequence[int]) -> int:
    """What the null device draws after `text`: a function of all of it, and of nothing else."""
    digest = hashlib.sha256(np.asarray(text, np.int32).tobytes()).digest()
    return int.from_bytes(digest[:4], "little") % VOCAB_SIZE


def continuation(prompt: Sequence[int], count: int, window: int | None = None) -> list[int]:
    """The `count` tokens that the null device draws after `prompt` when it runs alone."""
    text = list(prompt)
    for _ in range(count):
        text.append(next_token(text if window is None else text[-window:]))
    return text[len(prompt) :]


@dataclass(eq=False)
class NullRunner:
    """Runs a StepBatch on a memory of (token, index) cells; asserts what attention would read.

    What it draws is a function of every token that it reads, so a block of another text is noticed by what comes out.
    """

    launch: Launch
    num_blocks: Sequence[int]
    poison: frozenset[int] = frozenset()
    """Requests whose text holds such a token get logits that are not finite."""
    fault: Callable[[StepBatch], Exception | None] = lambda batch: None
    """What a step raises, after it has run: its cells are written, and what it drew is lost."""
    meaning: str = "request"
    """What classify says of it."""
    loses_cache: bool = False
    steps: list[StepBatch] = field(default_factory=list)
    resets: list[tuple[int, I32 | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.builder = BatchBuilder(
            self.launch.model,
            self.launch.options,
            self.launch.shapes.batch,
            has_token_slots=self.launch.capabilities.overlapped_steps,
        )
        size = self.launch.options.block_size
        self.cells: list[list[tuple[int, int] | None]] = [
            [None] * (n * size) for n in self.num_blocks
        ]
        self.texts: dict[tuple[int, int], list[int]] = {}
        self.num_caches = 1

    def step(
        self, batch: StepBatch, resets: Sequence[tuple[int, I32 | None]] = ()
    ) -> StepOutput | None:
        self.resets += resets
        self.steps.append(batch)
        self._check_layout(batch)
        layout, size = self.launch.shapes.batch.token_layout, self.launch.options.block_size
        row, index = token_row(batch, layout), token_index(batch, layout)
        written: dict[tuple[int, int], int] = {}
        for group in range(len(self.cells)):
            mapping = slot_mapping(batch, group, size, layout)
            for token in np.flatnonzero(row >= 0).tolist():
                slot = int(mapping[token])
                assert slot >= size, "a token was written to the null block"
                assert (group, slot) not in written, "two tokens were written to one slot"
                written[group, slot] = int(row[token])
                self.cells[group][slot] = (int(batch.token_ids[token]), int(index[token]))
        ids = np.zeros(batch.bucket.num_logits, np.int32)
        finite = np.ones(batch.bucket.num_logits, bool)
        for logit in range(batch.num_logits):
            text = self._read(batch, int(row[batch.logit_index[logit]]), written)
            ids[logit] = next_token(text)
            finite[logit] = not self.poison.intersection(text)
        if (error := self.fault(batch)) is not None:
            raise error
        if not batch.num_logits:
            return None
        return StepOutput(ids=ids, finite=finite)  # type: ignore[arg-type]

    def classify(self, error: Exception) -> str:
        return self.meaning

    def replace_lost_cache(self) -> bool:
        if self.loses_cache:
            self.num_caches += 1
            self.cells = [[None] * len(cells) for cells in self.cells]
        return self.loses_cache

    def counters(self) -> dict[str, float]:
        return {}

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _read(self, batch: StepBatch, row: int, written: dict[tuple[int, int], int]) -> list[int]:
        """The text of a row as attention sees it in its cache; every group must tell the same, within its window."""
        size, length = self.launch.options.block_size, int(batch.context_len[row])
        text: list[int] = []
        for group, spec in enumerate(self.launch.model.groups):
            first = 0 if spec.window is None else max(0, length - spec.window)
            seen = []
            for index in range(first, length):
                block = int(batch.block_table[group][row, index // size])
                slot = block * size + index % size
                assert block != 0, f"row {row} reads the null block at {index}"
                assert written.get((group, slot), row) == row, (
                    "a row reads what another wrote in this step"
                )
                cell = self.cells[group][slot]
                assert cell is not None, "a row reads what nobody wrote"
                assert cell[1] == index, "a row reads another position"
                seen.append(cell[0])
            if spec.window is None:
                text = seen
            else:
                assert len(text) < length or text[first:] == seen, "groups tell different texts"
                text = text or seen
        return text

    def _check_layout(self, batch: StepBatch) -> None:
        policy = self.launch.shapes.batch
        assert batch.num_rows <= policy.max_rows
        assert batch.num_tokens <= policy.max_tokens
        assert int(batch.query_len.sum()) == batch.num_tokens
        assert all(batch.query_len[: batch.num_decode_rows] == 1), "decode rows come first"
        slots = batch.row_slot[: batch.num_rows].tolist()
        assert len(set(slots)) == len(slots), "two rows share a slot"
        if not policy.mixed:
            assert batch.num_decode_rows in (0, batch.num_rows)
        if policy.max_prefills is not None:
            assert batch.num_rows - batch.num_decode_rows <= policy.max_prefills


class RowsShapes(ShapePolicy):
    """T = R * Q, in powers of two."""

    def __init__(self, batch: BatchPolicy, block_size: int) -> None:
        self.batch, self.block_size = batch, block_size

    def fit(self, shape: BatchShape) -> Bucket:
        rows, query = (1 << (n - 1).bit_length() for n in (shape.num_rows, shape.max_query))
        if rows * query > 2 * self.batch.max_tokens:
            raise TooLarge("rows", shape.num_rows - 1)
        return Bucket(
            phase=shape.phase,
            num_rows=rows,
            num_tokens=rows * query,
            num_logits=rows,
            max_query=query,
            blocks_per_row=-(-shape.max_context // self.block_size) + 1,
        )


class NullPlugin(Plugin):
    """The parent half of a device that computes nothing."""

    info = PluginInfo(name="null", api_version=API_VERSION, distribution="tests", summary="nothing")

    def probe(self) -> Probe:
        return Probe(available=True, num_devices=1, reason="made for tests")

    def capabilities(self, probe: Probe) -> Capabilities:
        features = frozenset({"sampled", "filters", "penalties", "bias", "logprobs"})
        return Capabilities(
            device_type="cpu",
            chunked_prefill=True,
            prefix_cache=True,
            preemption=True,
            features=features,
        )

    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        return null_options(max_context=options.max_context or model.max_context)

    def shapes(self, options: ResolvedOptions, model: ModelSpec) -> ShapePolicy:
        return DynamicShapes(
            BatchPolicy(max_rows=options.max_batch_rows, max_tokens=options.max_batch_tokens),
            options.block_size,
        )

    def create(self, launch: Launch) -> None:  # type: ignore[override]
        raise NotImplementedError


def null_options(
    *, block_size: int = 4, max_context: int = 256, max_tokens: int = 16, max_rows: int = 8
) -> ResolvedOptions:
    return ResolvedOptions(
        dtype="float32",
        kv_dtype="auto",
        block_size=block_size,
        max_context=max_context,
        max_batch_tokens=max_tokens,
        max_batch_rows=max_rows,
        max_logprobs=5,
        max_logit_bias=8,
        memory_utilisation=0.9,
        graph_memory=0.0,
        kv_bytes=None,
        parallel=ParallelOptions(),
        backend_options={},
        reasons={},
    )


def kv_group(window: int | None = None, layers: tuple[int, ...] = (0,)) -> KVGroup:
    return KVGroup(
        kind="full" if window is None else "sliding",
        layers=layers,
        num_kv_heads=1,
        head_size=8,
        value_size=8,
        dtype="float32",
        window=window,
    )


def null_engine(
    *,
    num_blocks: int | Sequence[int] = 64,
    windows: Sequence[int | None] = (None,),
    policy: BatchPolicy | None = None,
    capabilities: Capabilities | None = None,
    block_size: int = 4,
    max_context: int = 256,
    num_slots: int = 8,
    prefix_cache: bool = True,
    preempt_every: int = 0,
    poison: frozenset[int] = frozenset(),
    shapes: ShapePolicy | None = None,
    **faults: object,
) -> Engine:
    """An engine over the null device, with `num_blocks` per KV group."""
    plugin = NullPlugin()
    capabilities = capabilities or plugin.capabilities(plugin.probe())
    policy = policy or BatchPolicy(max_rows=num_slots, max_tokens=16)
    groups = tuple(kv_group(window, (layer,)) for layer, window in enumerate(windows))
    counts = [num_blocks] * len(groups) if isinstance(num_blocks, int) else list(num_blocks)
    options = null_options(
        block_size=block_size,
        max_context=max_context,
        max_tokens=policy.max_tokens,
        max_rows=num_slots,
    )
    attention = AttentionSpec(
        num_heads=1, num_kv_heads=1, head_size=8, value_size=8, scale=1.0, group=0
    )
    model = ModelSpec(
        architecture="null",
        num_layers=len(groups),
        hidden_size=8,
        vocab_size=VOCAB_SIZE,
        max_context=max_context,
        dtype="float32",
        weight_bytes=0,
        groups=groups,
        attention=(attention,),
    )
    launch = Launch(
        plugin="null",
        worker=WorkerSpec(rank=0, local_rank=0, host=0, devices=(0,)),
        world_size=1,
        rendezvous="",
        groups={"tensor": (0,)},
        capabilities=capabilities,
        options=options,
        model=model,
        shapes=shapes
        or (RowsShapes if policy.token_layout == "rows" else DynamicShapes)(policy, block_size),
    )
    kv = KVCacheManager(
        groups,
        counts,
        block_size=block_size,
        max_step_tokens=policy.max_tokens,
        prefix_cache=prefix_cache and capabilities.prefix_cache,
    )
    scheduler = Scheduler(
        launch.shapes, capabilities, kv, num_slots=num_slots, max_context=max_context
    )
    ready = Ready(
        backend="null",
        device="null",
        reason="",
        architecture="null",
        dtype="float32",
        kv_dtype="float32",
        block_size=block_size,
        num_blocks=max(counts) - 1,
        kv_tokens=max(counts) * block_size,
        max_context=max_context,
        max_batch_tokens=policy.max_tokens,
        max_batch_rows=num_slots,
        max_logprobs=options.max_logprobs,
        max_logit_bias=options.max_logit_bias,
        features=sorted(capabilities.features),
        weight_bytes=0,
        reasons={},
    )
    runner = NullRunner(launch, counts, poison, **faults)  # type: ignore[arg-type]
    return Engine(plugin, runner, scheduler, ready, preempt_every=preempt_every)  # type: ignore[arg-type]


def submit(
    request_id: int, prompt: Sequence[int], max_new_tokens: int | None = 4, **fields: object
) -> Submit:
    """A greedy request."""
    from chipset.backends.options import SamplingParams

    defaults: dict[str, object] = {"sampling": SamplingParams(), "stop_ids": []}
    return Submit(
        request_id=request_id,
        prompt=list(prompt),
        max_new_tokens=max_new_tokens,
        **(defaults | fields),  # type: ignore[arg-type]
    )
