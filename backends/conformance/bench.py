"""A table of logits to draw from, and whether what was drawn is what the definitions give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..step import F32, I32, StepOutput
from .drawing import F64, Drawing, drawn_from, log_softmax, sampling_arrays, scores
from .modules import Reader
from .session import Session
from .tokens import decode_rows, pieces

MARGIN = 1e-3
"""A device's logarithms may swap two scores that are nearer than this; such draws are not compared."""
LOGPROB_ERROR = 1e-4
"""float32's exponentials and logarithms, over a few hundred terms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """A session and the logits that its rows draw from."""

    session: Session
    logits: F32
    """[N, V]"""
    reader: Reader
    num_held: int

    @property
    def num_slots(self) -> int:
        """Request slots; also the id of the sink."""
        return self.session.launch.options.max_batch_rows

    def features(self, needed: frozenset[str]) -> frozenset[str]:
        """The smallest variant that has `needed`, as the core chooses."""
        variants = self.session.launch.shapes.draw_variants() or [needed]
        return min((v for v in variants if v >= needed), key=lambda v: (len(v), sorted(v)))

    def draw(
        self,
        drawings: Sequence[Drawing],
        extra: frozenset[str] = frozenset(),
        *,
        reader: Reader | None = None,
    ) -> StepOutput:
        """One decoding row each, in as few steps as hold them; numpy arrays [len(drawings), …]."""
        needed = extra.union(*(drawing.features for drawing in drawings))
        features = self.features(needed)
        found: list[StepOutput] = []
        for piece in pieces(len(drawings), self.num_held):
            some = drawings[piece]
            slots = [index if d.slot is None else d.slot for index, d in enumerate(some)]
            rows = decode_rows(self.session, [drawing.row for drawing in some], slots)
            batch = self.session.batch(
                rows, features=features, sampling=self.arrays(some, features)
            )
            found.append(self.session.draw(reader or self.reader, batch))
        return _joined(found)

    def arrays(
        self, drawings: Sequence[Drawing], features: frozenset[str]
    ) -> Mapping[str, I32 | F32]:
        """What Session.batch takes as `sampling`."""
        return sampling_arrays(
            drawings,
            features,
            num_slots=self.num_slots,
            vocab_size=self.logits.shape[1],
            max_logit_bias=self.session.launch.options.max_logit_bias,
        )

    def reset(self, slot: int, counts: I32 | None) -> None:
        """A request takes the slot."""
        with torch.inference_mode():
            kv = self.session.backend.kv
            self.session.cache = kv.reset_slot(self.session.cache, slot, counts)

    def expect(
        self,
        drawings: Sequence[Drawing],
        output: StepOutput,
        counts: Mapping[int, I32] | None = None,
    ) -> None:
        """The ids are those that the definitions give, and so are logprobs where there are any."""
        ids: I32 = np.asarray(output.ids)
        assert ids.dtype == np.int32, f"ids are {ids.dtype}, not int32"
        assert np.all(np.asarray(output.finite)), "rows of finite logits are said not to be finite"
        num_compared = 0
        for index, drawing in enumerate(drawings):
            held = None if counts is None or drawing.slot is None else counts[drawing.slot]
            logits = self.logits[drawing.row]
            found = scores(logits, drawing, held)
            second, best = np.sort(found)[-2:]
            if best - second > MARGIN and drawing.target is None:
                num_compared += 1
                wanted = int(np.argmax(found))
                assert ids[index] == wanted, f"{ids[index]} drawn, {wanted} due: {drawing}"
            if output.logprob is not None:
                of = drawn_from(logits, drawing, held) if drawing.of_drawn else logits
                expect_logprobs(np.asarray(of, np.float64), output, index)
        wanted_rows = sum(drawing.target is None for drawing in drawings)
        assert num_compared >= 0.8 * wanted_rows, "nearly all scores are too near to compare"


def expect_logprobs(logits: F64, output: StepOutput, index: int) -> None:
    """Row `index` scores its id, ranks it and lists the best of `logits` [V], -inf where nothing is drawn."""
    exact = log_softmax(logits)
    fields = (output.ids, output.logprob, output.rank, output.top_ids, output.top_logprobs)
    assert all(field is not None for field in fields), "a field of logprobs is missing"
    token, logprob, rank, top_ids, top = (np.asarray(field)[index] for field in fields)
    assert abs(logprob - exact[token]) < LOGPROB_ERROR, (
        f"logprob of {token} is {logprob}, should be {exact[token]}"
    )
    least, most = (1 + int((exact > exact[token] + error).sum()) for error in (1e-5, -1e-5))
    assert least <= rank <= most, f"rank of {token} is {rank}, should be {least}"
    assert not np.isnan(top).any(), "a logprob among the best is nan"
    count = min(top.size, int(np.isfinite(exact).sum()))
    wanted = np.sort(exact)[::-1][:count]
    np.testing.assert_allclose(top[:count], wanted, rtol=0, atol=LOGPROB_ERROR)
    np.testing.assert_allclose(exact[top_ids[:count]], top[:count], rtol=0, atol=LOGPROB_ERROR)
    assert len(set(top_ids[:count].tolist())) == count, "an id is twice among the best"


def _joined(outputs: Sequence[StepOutput]) -> StepOutput:
    names = StepOutput.__dataclass_fields__
    parts = {name: [getattr(output, name) for output in outputs] for name in names}
    return StepOutput(
        **{name: None if some[0] is None else np.concatenate(some) for name, some in parts.items()}  # type: ignore[arg-type]
    )
