"""Drawing tokens over the whole batch in plain torch; the order of the steps is that of ..sampler.

Shapes depend on the bucket alone and no value steers the program, so a compiler can take it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kv_cache import IN_PROMPT, Cache
from ..sampler import Sampler
from ..step import StepInputs, StepOutput
from .kv_cache import PagedCache

MASKED = torch.finfo(torch.float32).min
SamplingTensors = Mapping[str, Tensor]


class ReferenceSampler(Sampler):
    """All features but watermark. With in_place=False the cache is never written to: a new one is returned."""

    def __init__(self, max_logprobs: int, *, in_place: bool = True) -> None:
        self.max_logprobs = max_logprobs
        self.in_place = in_place

    def feed(self, inputs: StepInputs, cache: Cache) -> Tensor:
        """See Sampler.feed."""
        slot = inputs.token_slot
        if slot is None:
            return inputs.token_ids
        drawn = cache.last_ids.index_select(0, slot.clamp(min=0))
        return torch.where(slot >= 0, drawn, inputs.token_ids)

    def __call__(
        self, logits: Tensor, inputs: StepInputs, cache: Cache
    ) -> tuple[StepOutput, Cache]:
        """See Sampler."""
        features, sampling = inputs.features, inputs.sampling
        raw, finite = logits, self.finite(logits)
        if "penalties" in features:
            held = cache.counts.index_select(0, sampling["slot"])
            logits = penalise(logits, held, sampling["penalties"])
        if "bias" in features:
            logits = add_bias(logits, sampling["bias_ids"], sampling["bias_values"])
        if "bitmask" in features:
            logits = torch.where(allowed(sampling["bitmask"], logits.shape[-1]), logits, MASKED)
        logits, ids = self.draw(logits, features, sampling)
        if "targets" in features:
            ids = torch.where(sampling["target"] >= 0, sampling["target"], ids)
        more: dict[str, Tensor] = {}
        if "logprobs" in features:
            of_drawn = sampling["of_drawn"][:, None] > 0
            more = logprobs(torch.where(of_drawn, logits, raw), ids, self.max_logprobs)
        cache = self._keep(cache, sampling["slot"], ids, counted="penalties" in features)
        return StepOutput(ids=ids, finite=finite, **more), cache

    def draw(
        self, logits: Tensor, features: frozenset[str], sampling: SamplingTensors
    ) -> tuple[Tensor, Tensor]:
        """(logits [L, V] as drawn from, ids [L] i32): temperature, filters, noise, argmax.

        A greedy row (temperature 0) is neither filtered nor given noise.
        """
        if "sampled" not in features:
            return logits, torch.argmax(logits, -1).to(torch.int32)
        logits = heat(logits, sampling["temperature"])
        hot = sampling["temperature"][:, None] > 0
        if "filters" in features:
            logits = torch.where(hot, self.filter(logits, sampling), logits)
        noisy = self.noisy_best(logits, sampling["seed"], sampling["position"])
        return logits, torch.where(hot[:, 0], noisy, torch.argmax(logits, -1).to(torch.int32))

    def noisy_best(self, logits: Tensor, seed: Tensor, position: Tensor) -> Tensor:
        """[L] i32 argmax of logits + noise."""
        token = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
        noisy = logits + gumbel(noise_key(seed, position)[:, None], token)
        return torch.argmax(noisy, -1).to(torch.int32)

    def finite(self, logits: Tensor) -> Tensor:
        """[L] bool: no nan (which least and greatest would be) and no inf."""
        low, high = torch.aminmax(logits, dim=-1)
        return torch.isfinite(low) & torch.isfinite(high)

    def filter(self, logits: Tensor, sampling: SamplingTensors) -> Tensor:
        """top_k, top_p, typical_p, min_p; each sees what the one before left."""
        logits = keep_top_k(logits, sampling["top_k"])
        logits = keep_top_p(logits, sampling["top_p"])
        logits = keep_typical(logits, sampling["typical_p"])
        return keep_min_p(logits, sampling["min_p"])

    def _keep(self, cache: PagedCache, slot: Tensor, ids: Tensor, *, counted: bool) -> PagedCache:
        one = torch.ones_like(ids)
        if self.in_place:
            cache.last_ids.index_put_((slot,), ids)
            if counted:
                cache.counts.index_put_((slot, ids), one, accumulate=True)
            return cache
        counts = cache.counts
        if counted:
            counts = counts.index_put((slot, ids), one, accumulate=True)
        return cache._replace(last_ids=cache.last_ids.index_put((slot,), ids), counts=counts)


def penalise(logits: Tensor, held: Tensor, penalties: Tensor) -> Tensor:
    """Repetition (as Hugging Face: of prompt and output), then frequency and presence (as OpenAI: of the output).

    held [L, V] counts, penalties [L, 3].
    """
    repetition, frequency, presence = penalties[:, :, None].unbind(1)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(held > 0, repeated, logits)
    drawn = held & (IN_PROMPT - 1)
    return logits - frequency * drawn - presence * (drawn > 0)


def add_bias(logits: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """ids, values [L, N]: pad -1 adds nothing."""
    real = ids >= 0
    bias = torch.zeros_like(logits).scatter_add(
        -1, ids.clamp(min=0), torch.where(real, values, 0.0)
    )
    return logits + bias


def allowed(bitmask: Tensor, vocab_size: int) -> Tensor:
    """[L, ceil(V / 32)] i32 -> [L, V] bool."""
    token = torch.arange(vocab_size, dtype=torch.int32, device=bitmask.device)
    word = bitmask.index_select(1, token >> 5)
    # the shift drags the sign along, which leaves the lowest bit right all the same
    return ((word >> (token & 31)) & 1) > 0


def heat(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits / temperature [L], unchanged where that is 0."""
    scale = torch.where(temperature > 0, temperature, 1.0)[:, None]
    # a masked logit over a temperature below 1 would be -inf, which some devices do not know
    least = MASKED / 2 * scale.clamp(max=1)
    return torch.maximum(logits, least) / scale


def keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """The k [L] best and all that equal the last of them."""
    best = logits.sort(-1, descending=True).values
    last = best.gather(-1, (top_k.clamp(1, logits.shape[-1]) - 1)[:, None])
    return torch.where(logits >= last, logits, MASKED)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """The best until their probability reaches p [L], the one that crosses it too; of equals the lower id first."""
    ordered, indices = logits.sort(dim=-1, descending=True, stable=True)
    indices = indices.to(torch.int32)
    share = torch.softmax(ordered, -1)
    before = share.cumsum(-1) - share
    best = indices == indices[:, :1]
    keep = (before < top_p[:, None]) | (top_p[:, None] >= 1) | best
    kept = torch.zeros_like(keep).scatter(-1, indices, keep)
    return torch.where(kept, logits, MASKED)


def keep_typical(logits: Tensor, typical_p: Tensor) -> Tensor:
    """Those whose surprise is nearest to the mean one, until their probability reaches p [L].

    Locally typical sampling, Meister et al. 2022 (arXiv:2202.00666).
    """
    log_share = torch.log_softmax(logits, -1)
    share = log_share.exp()
    entropy = -(share * log_share).sum(-1, keepdim=True)
    distance = (entropy + log_share).abs()
    ordered, indices = distance.sort(dim=-1, stable=True)
    reached = share.gather(-1, indices.to(torch.int32)).cumsum(-1) < typical_p[:, None]
    last = reached.sum(-1, keepdim=True, dtype=torch.int32).clamp(max=logits.shape[-1] - 1)
    keep = (distance <= ordered.gather(-1, last)) | (typical_p[:, None] >= 1)
    return torch.where(keep, logits, MASKED)


def keep_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Those at least min_p [L] times as likely as the best."""
    share = torch.softmax(logits, -1)
    least = min_p[:, None] * share.amax(-1, keepdim=True)
    return torch.where(share >= least, logits, MASKED)


def logprobs(logits: Tensor, ids: Tensor, count: int) -> dict[str, Tensor]:
    """The fields of StepOutput that belong to logprobs, of logits [L, V] and ids [L]."""
    all_logprobs = torch.log_softmax(logits, -1)
    mine = all_logprobs.gather(-1, ids[:, None])
    best = all_logprobs.topk(min(count, logits.shape[-1]), -1)
    return {
        "logprob": mine[:, 0],
        "rank": (all_logprobs > mine).sum(-1, dtype=torch.int32) + 1,
        "top_ids": best.indices.to(torch.int32),
        "top_logprobs": best.values,
    }


def noise_key(seed: Tensor, position: Tensor) -> Tensor:
    """[L] i32 of seed [L, 2] and position [L]: where the noise of a row starts from."""
    return _mix(_mix(_mix(seed[:, 0]) ^ seed[:, 1]) ^ position)


def gumbel(key: Tensor, token: Tensor) -> Tensor:
    """Noise f32 of keys and token ids, broadcast against each other, as ..sampler defines it."""
    bits = _mix(key ^ _mix(token + 1)) & 0x7FFFFF
    uniform = (bits.float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _mix(word: Tensor) -> Tensor:
    """Murmur3's 32-bit finaliser on int32, whose product wraps; the constants as their signed twins."""
    word = (word ^ _shift_right(word, 16)) * -2048144789
    word = (word ^ _shift_right(word, 13)) * -1028477387
    return word ^ _shift_right(word, 16)


def _shift_right(word: Tensor, bits: int) -> Tensor:
    """As if unsigned: what the sign dragged in is cut off."""
    return torch.bitwise_and(word >> bits, 2 ** (32 - bits) - 1)
