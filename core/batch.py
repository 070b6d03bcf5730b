"""Rows of a step -> StepBatch, padded to its bucket."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..backends.kv_cache import IN_PROMPT
from ..backends.options import ModelSpec, ResolvedOptions
from ..backends.shapes import BatchPolicy, Bucket
from ..backends.step import F32, I32, SamplingBatch, StepBatch, neutral_sampling
from .request import Request
from .scheduler import Row


class BatchBuilder:
    """Builds the batches of one model; it holds sizes only."""

    def __init__(
        self,
        model: ModelSpec,
        options: ResolvedOptions,
        policy: BatchPolicy,
        *,
        has_token_slots: bool,
    ) -> None:
        self.num_groups = len(model.groups)
        self.vocab_size = model.vocab_size
        self.num_slots = options.max_batch_rows
        self.max_logit_bias = options.max_logit_bias
        self.is_rows_layout = policy.token_layout == "rows"
        self.has_token_slots = has_token_slots

    def build(self, rows: Sequence[Row], bucket: Bucket, features: frozenset[str]) -> StepBatch:
        """A batch of `rows`, decode rows first; no rows make one of padding alone."""
        num_rows, num_tokens, num_logits = bucket.num_rows, bucket.num_tokens, bucket.num_logits
        token_ids, positions = _zeros(num_tokens), _zeros(1, num_tokens)
        query_len, context_len = _zeros(num_rows), _zeros(num_rows)
        row_slot = _filled(self.num_slots, num_rows)
        tables = [_zeros(num_rows, bucket.blocks_per_row) for _ in range(self.num_groups)]
        logit_index = _zeros(num_logits)
        drawing: list[Request] = []
        first = 0
        for index, row in enumerate(rows):
            request, start, end = row.request, row.start, row.end
            assert request.table is not None
            assert request.slot is not None
            at = index * bucket.max_query if self.is_rows_layout else first
            token_ids[at : at + row.count] = request.tokens[start:end]
            positions[0, at : at + row.count] = range(start, end)
            query_len[index], context_len[index], row_slot[index] = row.count, end, request.slot
            for table, blocks in zip(tables, request.table.blocks, strict=True):
                used = blocks[: bucket.blocks_per_row]
                table[index, : len(used)] = used
            if row.is_drawing:
                logit_index[len(drawing)] = at + row.count - 1
                drawing.append(request)
            first += row.count
        return StepBatch(
            bucket=bucket,
            num_rows=len(rows),
            num_decode_rows=sum(row.is_decode for row in rows),
            num_tokens=first,
            num_logits=len(drawing),
            token_ids=token_ids,
            positions=positions,
            query_len=query_len,
            context_len=context_len,
            row_slot=row_slot,
            block_table=tables,
            logit_index=logit_index,
            sampling=self._sampling(drawing, num_logits, features),
            token_slot=_filled(-1, num_tokens) if self.has_token_slots else None,
        )

    def counts(self, request: Request) -> I32 | None:
        """[V] what reset_slot wants to know of a request that takes a slot; None without penalties."""
        if "penalties" not in request.sampling.features:
            return None
        counts = _zeros(self.vocab_size)
        np.add.at(counts, request.tokens[request.num_prompt :], 1)
        counts[np.unique(request.tokens[: request.num_prompt])] += IN_PROMPT
        return counts

    def _sampling(
        self, requests: Sequence[Request], num_logits: int, features: frozenset[str]
    ) -> SamplingBatch:
        """Neutral values first, then those of each request for the features of the variant."""
        arrays = neutral_sampling(
            features,
            num_logits=num_logits,
            num_slots=self.num_slots,
            vocab_size=self.vocab_size,
            max_logit_bias=self.max_logit_bias,
        )
        for index, request in enumerate(requests):
            assert request.slot is not None
            arrays["slot"][index], arrays["position"][index] = request.slot, len(request.tokens)
            self._fill(arrays, index, request)
        return SamplingBatch(features=features, **arrays)  # type: ignore[arg-type]

    def _fill(
        self,
        arrays: dict[str, I32 | F32],
        index: int,
        request: Request,
    ) -> None:
        sampling = request.sampling
        if "temperature" in arrays:
            arrays["temperature"][index] = sampling.temperature
            seed = sampling.seed or 0
            words = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint32)
            arrays["seed"][index] = words.view(np.int32)
        if "top_k" in arrays:
            top_k = sampling.top_k or self.vocab_size
            arrays["top_k"][index] = min(top_k, self.vocab_size)
            arrays["top_p"][index] = sampling.top_p
            arrays["min_p"][index] = sampling.min_p
            arrays["typical_p"][index] = sampling.typical_p
        if "penalties" in arrays:
            arrays["penalties"][index] = (
                sampling.repetition_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        if "bias_ids" in arrays:
            bias = request.bias
            arrays["bias_ids"][index, : len(bias)] = list(bias)
            arrays["bias_values"][index, : len(bias)] = list(bias.values())
        if "of_drawn" in arrays:
            arrays["of_drawn"][index] = request.of_drawn


def _zeros(*shape: int) -> I32:
    return np.zeros(shape, np.int32)


def _filled(value: int, *shape: int) -> I32:
    return np.full(shape, value, np.int32)
