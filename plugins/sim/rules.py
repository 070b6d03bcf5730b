"""What a simulator refuses: RuleBroken, and the rules of how a step may be composed."""

from __future__ import annotations

import numpy as np

from ...backends.capabilities import Capabilities
from ...backends.errors import PluginError
from ...backends.plugin import Launch
from ...backends.shapes import Phase
from ...backends.step import StepBatch, row_first, slot_mapping, token_row


class RuleBroken(PluginError):
    """The engine or a model did what the simulated vendor's device does not allow; `rule` names which of its rules."""

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(f"rule {rule!r} broken: {what}; the engine or the model must obey it")
        self.rule = rule


class StepRules:
    """Checks a StepBatch against the policy, the buckets and the layout that its plugin declared."""

    def __init__(self, launch: Launch) -> None:
        self.policy = launch.shapes.batch
        self.capabilities: Capabilities = launch.capabilities
        self.block_size = launch.options.block_size
        self.num_slots = launch.options.max_batch_rows
        self.variants = frozenset(launch.shapes.draw_variants())

    def check(self, batch: StepBatch) -> None:
        """Raises RuleBroken."""
        self._check_composition(batch)
        self._check_rows(batch)
        self._check_logits(batch)
        for group in range(len(batch.block_table)):
            self._check_blocks(batch, group)
        _check_arrays(batch)

    def _check_composition(self, batch: StepBatch) -> None:
        policy, bucket = self.policy, batch.bucket
        num_prefills = batch.num_rows - batch.num_decode_rows
        _obey(
            "mixing",
            policy.mixed or batch.num_decode_rows in (0, batch.num_rows),
            f"{batch.num_decode_rows} decode rows beside {num_prefills} prefill rows",
        )
        if bucket.phase is not Phase.MIXED and batch.num_rows:
            of_bucket = batch.num_rows if bucket.phase is Phase.DECODE else 0
            _obey(
                "phase",
                batch.num_decode_rows == of_bucket,
                f"{batch.num_decode_rows} of {batch.num_rows} rows decode in a {bucket.phase} bucket",
            )
        _obey(
            "prefills a step",
            policy.max_prefills is None or num_prefills <= policy.max_prefills,
            f"{num_prefills} prefill rows, {policy.max_prefills} allowed",
        )
        limits = (
            ("rows a step", batch.num_rows, policy.max_rows),
            ("tokens a step", batch.num_tokens, policy.max_tokens),
            ("context", int(batch.context_len.max(initial=0)), policy.max_context),
            ("rows of the bucket", batch.num_rows, bucket.num_rows),
            ("query of the bucket", int(batch.query_len.max(initial=0)), bucket.max_query),
        )
        for rule, found, limit in limits:
            _obey(rule, found <= limit, f"{found} found, {limit} allowed")

    def _check_rows(self, batch: StepBatch) -> None:
        query, context, rows = batch.query_len, batch.context_len, batch.num_rows
        # it brings a token drawn before and drafts after it, each with a row of logits of its own
        first = row_first(batch, self.policy.token_layout)
        drawn = set(batch.logit_index[: batch.num_logits].tolist())
        brought = [
            int(first[row]) + n for row in range(batch.num_decode_rows) for n in range(query[row])
        ]
        _obey(
            "decode rows first",
            bool((query[: batch.num_decode_rows] > 0).all()) and drawn.issuperset(brought),
            f"the first {batch.num_decode_rows} rows bring {query[: batch.num_decode_rows].tolist()} tokens",
        )
        real = query > 0
        _obey(
            "padding rows are empty",
            bool(real[:rows].all()) and not real[rows:].any() and not context[rows:].any(),
            f"{rows} rows, but lengths {query.tolist()}",
        )
        slots = batch.row_slot[:rows].tolist()
        _obey(
            "one slot a row",
            len(set(slots)) == rows
            and all(0 <= slot < self.num_slots for slot in slots)
            and bool((batch.row_slot[rows:] == self.num_slots).all()),
            f"slots {batch.row_slot.tolist()}",
        )
        _obey(
            "token slots",
            (batch.token_slot is not None) == self.capabilities.overlapped_steps,
            "token_slot belongs to overlapped steps",
        )

    def _check_logits(self, batch: StepBatch) -> None:
        features = batch.sampling.features
        _obey(
            "draw variants",
            not self.variants or features in self.variants,
            f"{sorted(features)} is none of those declared",
        )
        if self.capabilities.chunked_prefill:
            return
        last = row_first(batch, self.policy.token_layout) + batch.query_len - 1
        drawn = set(batch.logit_index[: batch.num_logits].tolist())
        whole = [int(last[r]) in drawn for r in range(batch.num_decode_rows, batch.num_rows)]
        _obey("prompts whole", all(whole), "a prefill row draws nothing, so it is a chunk")

    def _check_blocks(self, batch: StepBatch, group: int) -> None:
        layout = self.policy.token_layout
        written = slot_mapping(batch, group, self.block_size, layout)
        written = written[token_row(batch, layout) >= 0]
        _obey(
            "null block",
            bool((written >= self.block_size).all()),
            f"a token of group {group} goes to block 0",
        )
        # the step that measures memory has all its rows in block 1
        measures = self.capabilities.kv_budget == "profile" and batch.block_table[group].max() == 1
        _obey(
            "one writer a place",
            measures or np.unique(written).size == written.size,
            f"two tokens of group {group} go to one place",
        )


def _check_arrays(batch: StepBatch) -> None:
    arrays = {
        "token_ids": batch.token_ids,
        "positions": batch.positions,
        "query_len": batch.query_len,
        "context_len": batch.context_len,
        "row_slot": batch.row_slot,
        "logit_index": batch.logit_index,
    }
    for name, array in arrays.items():
        _obey(
            "host arrays",
            array.dtype == np.int32 and array.flags.c_contiguous,
            f"{name} is {array.dtype}, contiguous: {array.flags.c_contiguous}",
        )


def _obey(rule: str, is_kept: bool, what: str) -> None:
    if not is_kept:
        raise RuleBroken(rule, what)
