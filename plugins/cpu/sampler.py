"""Drawing on the CPU: rows pay only for what they ask for, and nothing sorts a whole vocabulary without need."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...backends.reference import sampler as reference
from ...backends.reference.sampler import MASKED, ReferenceSampler, SamplingTensors

DRAWN_BY = ("temperature", "seed", "position", "top_k", "top_p", "min_p", "typical_p")
"""What drawing looks at, per row."""
NUCLEUS = 512
"""Best tokens among which top_p looks before it sorts them all."""

NOISE_RANGE = 20.0
"""Above the difference between the most and the least noise there is: -log(-log(u)) for u from 2**-24 to 1 - 2**-24."""


class CPUSampler(ReferenceSampler):
    """Draws what ReferenceSampler draws. Greedy rows cost an argmax; filters see the rows that use them."""

    def draw(
        self, logits: Tensor, features: frozenset[str], sampling: SamplingTensors
    ) -> tuple[Tensor, Tensor]:
        """See ReferenceSampler.draw."""
        if "sampled" not in features:
            return super().draw(logits, features, sampling)
        hot = torch.nonzero(sampling["temperature"] > 0)[:, 0]
        if len(hot) == len(logits):
            return super().draw(logits, features, sampling)
        ids = torch.argmax(logits, -1).to(torch.int32)
        if len(hot) == 0:
            return logits, ids
        some = {name: sampling[name][hot] for name in DRAWN_BY if name in sampling}
        drawn, ids[hot] = super().draw(logits[hot], features, some)
        return logits.index_copy(0, hot, drawn), ids

    def filter(self, logits: Tensor, sampling: SamplingTensors) -> Tensor:
        """See ReferenceSampler.filter."""
        top_k, top_p = sampling["top_k"], sampling["top_p"]
        typical_p, min_p = sampling["typical_p"], sampling["min_p"]
        filters = (
            (keep_top_k, top_k, top_k < logits.shape[-1]),
            (keep_top_p, top_p, top_p < 1),
            (reference.keep_typical, typical_p, typical_p < 1),
            (reference.keep_min_p, min_p, min_p > 0),
        )
        for keep, value, used in filters:
            rows = torch.nonzero(used)[:, 0]
            if len(rows) == len(logits):
                logits = keep(logits, value)
            elif len(rows):
                logits = logits.index_copy(0, rows, keep(logits[rows], value[rows]))
        return logits

    def noisy_best(self, logits: Tensor, seed: Tensor, position: Tensor) -> Tensor:
        """See ReferenceSampler.noisy_best; no noise for tokens that none could lift to the top."""
        near = logits >= logits.amax(-1, keepdim=True) - NOISE_RANGE
        row, token = (torch.from_numpy(index) for index in np.nonzero(near.numpy()))
        key = reference.noise_key(seed, position)
        noisy = logits[row, token] + reference.gumbel(key[row], token.int())
        best = torch.zeros(len(logits), dtype=torch.int32)
        first = 0
        for index, count in enumerate(near.sum(-1).tolist()):
            if count:  # a row of nan has none; whatever is drawn there, its request ends
                best[index] = token[first + torch.argmax(noisy[first : first + count])]
            first += count
        return best

    def finite(self, logits: Tensor) -> Tensor:
        """See ReferenceSampler.finite; a finite sum has only finite terms, and takes one pass."""
        finite = torch.isfinite(logits.sum(-1))
        return finite if bool(finite.all()) else super().finite(logits)


def keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """As the reference does, sorting no more than the largest k."""
    best = logits.topk(int(top_k.max()), -1).values
    last = best.gather(-1, (top_k - 1).long()[:, None])
    return torch.where(logits >= last, logits, MASKED)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """As the reference does, sorting no more than NUCLEUS where the probability is reached among them."""
    best = logits.topk(min(NUCLEUS, logits.shape[-1]), -1)
    share = torch.softmax(logits, -1).gather(-1, best.indices)
    before = share.cumsum(-1) - share
    count = (before < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1)
    if int(count.max()) == best.values.shape[1] < logits.shape[-1]:
        return reference.keep_top_p(logits, top_p)
    last = best.values.gather(-1, count - 1)
    above, equal = logits > last, logits == last
    spare = count - above.sum(-1, keepdim=True)
    return torch.where(above | (equal & (equal.cumsum(-1) <= spare)), logits, MASKED)
