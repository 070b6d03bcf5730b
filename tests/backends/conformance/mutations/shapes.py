"""Mistakes of shape and batch policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from chipset.backends.capabilities import Capabilities
from chipset.backends.errors import TooLarge
from chipset.backends.options import ResolvedOptions
from chipset.backends.shapes import BatchPolicy, BatchShape, Bucket, Phase, ShapePolicy

from ..bucketed import BucketedShapes
from ..mutation import Mutation
from ..reference_plugin import CAPABILITIES, ReferencePlugin


class NotMonotone(BucketedShapes):
    def fit(self, shape: BatchShape) -> Bucket:
        bucket = super().fit(shape)
        if bucket.phase is Phase.MIXED and shape.num_tokens < 4:
            return replace(bucket, num_tokens=self.tokens[-1], max_query=self.tokens[-1])
        return bucket


class RefusesLongRows(BucketedShapes):
    def fit(self, shape: BatchShape) -> Bucket:
        if shape.max_query > 64:
            raise TooLarge("query", 64)
        return super().fit(shape)


class RefusesLongPasts(BucketedShapes):
    def fit(self, shape: BatchShape) -> Bucket:
        if shape.max_query > 1 and shape.max_computed > 256:
            raise TooLarge("context", 256)
        return super().fit(shape)


class RoundsDown(BucketedShapes):
    def fit(self, shape: BatchShape) -> Bucket:
        whole = shape.max_context // self.block_size * self.block_size
        return super().fit(replace(shape, max_context=max(1, whole)))


class ForgetsThePast(BucketedShapes):
    def fit(self, shape: BatchShape) -> Bucket:
        return super().fit(replace(shape, max_context=shape.max_context - shape.max_computed))


class OneLogitsRow(BucketedShapes):
    def fit(self, shape: BatchShape) -> Bucket:
        return super().fit(replace(shape, num_logits=1))


class Undeclared(BucketedShapes):
    def buckets(self, num_blocks):  # type: ignore[no-untyped-def]
        return [b for b in super().buckets(num_blocks) if b.blocks_per_row < self.blocks[-1]]


class DeclaredByPool(BucketedShapes):
    def buckets(self, num_blocks):  # type: ignore[no-untyped-def]
        rows = num_blocks // self.blocks[-1]
        return [b for b in super().buckets(num_blocks) if b.num_rows <= rows]


class DeclaredTwice(BucketedShapes):
    def buckets(self, num_blocks):  # type: ignore[no-untyped-def]
        return [*super().buckets(num_blocks)] * 2


class EverySize(BucketedShapes):
    def __init__(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        super().__init__(*args, **kwargs)
        self.tokens = list(range(1, self.batch.max_tokens + 1))
        self.blocks = list(range(1, self.blocks[-1] + 1))


class ByHistory(BucketedShapes):
    largest_so_far = 1

    def fit(self, shape: BatchShape) -> Bucket:
        self.largest_so_far = max(self.largest_so_far, shape.max_context)
        return super().fit(replace(shape, max_context=self.largest_so_far))


class EmptyLimit(BucketedShapes):
    def fit(self, shape: BatchShape) -> Bucket:
        if shape.num_rows > 2:
            raise TooLarge("rows", shape.num_rows)
        return super().fit(shape)


class NoFullVariant(BucketedShapes):
    def draw_variants(self):  # type: ignore[no-untyped-def]
        return super().draw_variants()[:-1]


class LargestTooLarge(BucketedShapes):
    def largest(self):  # type: ignore[no-untyped-def]
        return [replace(shape, num_rows=self.batch.max_rows + 1) for shape in super().largest()]


def made(
    shapes: type[BucketedShapes], **policy: object
) -> Callable[[ResolvedOptions, Capabilities], ShapePolicy]:
    """`shapes` with a policy that is not quite what the options say."""

    def make(options: ResolvedOptions, capabilities: Capabilities) -> ShapePolicy:
        batch = BatchPolicy(
            max_rows=options.max_batch_rows,
            max_tokens=options.max_batch_tokens,
            max_context=options.max_context,
        )
        given = {
            name: value(options) if callable(value) else value for name, value in policy.items()
        }
        return shapes(
            replace(batch, **given),
            options.block_size,
            capabilities.features,
            max_context=options.max_context,
        )

    return make


def _shapes(
    name: str,
    mistake: str,
    shapes: type[BucketedShapes] = BucketedShapes,
    capabilities: Capabilities = CAPABILITIES,
    **policy: object,
) -> Mutation:
    plugin = partial(ReferencePlugin, shapes=made(shapes, **policy), capabilities=capabilities)
    return Mutation(name=name, area="shapes", mistake=mistake, plugin=plugin)


WHOLE = replace(CAPABILITIES, chunked_prefill=False)

MUTATIONS: tuple[Mutation, ...] = (
    _shapes("fit not monotone", "small steps get the largest bucket", NotMonotone),
    _shapes("a long row refused", "TooLarge for one row within the limits", RefusesLongRows),
    _shapes("a long past refused", "TooLarge for one chunk after many", RefusesLongPasts),
    _shapes("blocks rounded down", "a row's last block has no column", RoundsDown),
    _shapes("past forgotten", "columns for the step's tokens only", ForgetsThePast),
    _shapes("logits of drawing alone", "scored prompts find too few rows of logits", OneLogitsRow),
    _shapes("bucket not declared", "fit gives what warm-up did not know", Undeclared),
    _shapes("prefixes counted twice", "buckets for no more entries than blocks", DeclaredByPool),
    _shapes("bucket declared twice", "warm-up compiles each twice", DeclaredTwice),
    _shapes("a bucket for every size", "warm-up would take hours", EverySize),
    _shapes("fit by history", "equal shapes get the largest bucket so far", ByHistory),
    _shapes("limit that the step obeys", "TooLarge along an axis within its limit", EmptyLimit),
    _shapes("no variant of everything", "some requests can be drawn by none", NoFullVariant),
    _shapes("largest step too large", "profiling runs into TooLarge", LargestTooLarge),
    _shapes(
        "more rows than slots",
        "max_rows is above max_batch_rows",
        max_rows=lambda options: options.max_batch_rows + 1,
    ),
    _shapes(
        "texts cut short",
        "max_context is below what was promised",
        max_context=lambda options: options.max_context // 2,
    ),
    _shapes(
        "prompts that fit no step",
        "max_tokens below max_context, and no chunks",
        capabilities=WHOLE,
        max_tokens=64,
    ),
    _shapes("rows that mix", "token_layout rows, and mixed", token_layout="rows"),
)
