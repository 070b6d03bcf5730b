"""Drawing on the CPU: greedy rows pay for nothing but their argmax."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.reference.sampler import ReferenceSampler, SamplingTensors

DRAWN_BY = ("temperature", "seed", "position", "top_k", "top_p", "min_p", "typical_p")
"""What drawing looks at, per row."""


class CPUSampler(ReferenceSampler):
    """Sampled rows are drawn apart from greedy ones."""

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
        some = {name: sampling[name][hot] for name in DRAWN_BY if name in sampling}
        drawn, ids[hot] = super().draw(logits[hot], features, some)
        return logits.index_copy(0, hot, drawn), ids
