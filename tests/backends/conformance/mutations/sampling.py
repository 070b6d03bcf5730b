"""Samplers that draw, count or score wrongly."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from chipset.backends.kv_cache import IN_PROMPT, Cache
from chipset.backends.reference import sampler as reference
from chipset.backends.reference.sampler import MASKED, ReferenceSampler, SamplingTensors
from chipset.backends.reference.staging import Staged
from chipset.backends.shapes import Phase
from chipset.backends.step import StepBatch, StepInputs, StepOutput, row_first

from ..mutation import Mutation
from ..reference_plugin import ReferenceBackend, ReferencePlugin


class TopPCutsEarly(ReferenceSampler):
    def filter(self, logits: Tensor, sampling: SamplingTensors) -> Tensor:
        order = logits.sort(dim=-1, descending=True, stable=True)
        reached = torch.softmax(order.values, -1).cumsum(-1)
        keep = (reached <= sampling["top_p"][:, None]) | (sampling["top_p"][:, None] >= 1)
        keep[:, 0] = True
        kept = torch.zeros_like(keep).scatter(-1, order.indices, keep)
        off = {"top_p": torch.ones_like(sampling["top_p"])}
        return super().filter(torch.where(kept, logits, MASKED), {**sampling, **off})


class TopKKeepsOneMore(ReferenceSampler):
    def filter(self, logits: Tensor, sampling: SamplingTensors) -> Tensor:
        return super().filter(logits, {**sampling, "top_k": sampling["top_k"] + 1})


class MinPOfAll(ReferenceSampler):
    def filter(self, logits: Tensor, sampling: SamplingTensors) -> Tensor:
        share = torch.softmax(logits, -1)
        logits = torch.where(share >= sampling["min_p"][:, None], logits, MASKED)
        return super().filter(logits, {**sampling, "min_p": torch.zeros_like(sampling["min_p"])})


class TypicalKeepsTheLikely(ReferenceSampler):
    def filter(self, logits: Tensor, sampling: SamplingTensors) -> Tensor:
        logits = reference.keep_top_p(logits, sampling["typical_p"])
        off = {"typical_p": torch.ones_like(sampling["typical_p"])}
        return super().filter(logits, {**sampling, **off})


class FiltersBeforeTemperature(ReferenceSampler):
    def draw(
        self, logits: Tensor, features: frozenset[str], sampling: SamplingTensors
    ) -> tuple[Tensor, Tensor]:
        if "filters" in features:
            hot = sampling["temperature"][:, None] > 0
            logits = torch.where(hot, self.filter(logits, sampling), logits)
        return super().draw(logits, features - {"filters"}, sampling)


class HighWordIgnored(ReferenceSampler):
    def noisy_best(self, logits: Tensor, seed: Tensor, position: Tensor) -> Tensor:
        return super().noisy_best(logits, seed * torch.tensor([1, 0], dtype=torch.int32), position)


class NoiseByRow(ReferenceSampler):
    def noisy_best(self, logits: Tensor, seed: Tensor, position: Tensor) -> Tensor:
        rows = torch.arange(len(position), dtype=torch.int32)
        return super().noisy_best(logits, seed, rows)


class SignedShift(ReferenceSampler):
    def noisy_best(self, logits: Tensor, seed: Tensor, position: Tensor) -> Tensor:
        def mix(word: Tensor) -> Tensor:
            word = (word ^ (word >> 16)) * -2048144789
            word = (word ^ (word >> 13)) * -1028477387
            return word ^ (word >> 16)

        token = torch.arange(logits.shape[-1], dtype=torch.int32)
        key = mix(mix(mix(seed[:, 0]) ^ seed[:, 1]) ^ position)[:, None]
        bits = mix(key ^ mix(token + 1)) & 0x7FFFFF
        uniform = (bits.float() + 0.5) * 2.0**-23
        return torch.argmax(logits - torch.log(-torch.log(uniform)), -1).to(torch.int32)


class UniformNoise(ReferenceSampler):
    def noisy_best(self, logits: Tensor, seed: Tensor, position: Tensor) -> Tensor:
        token = torch.arange(logits.shape[-1], dtype=torch.int32)
        gumbel = reference.gumbel(reference.noise_key(seed, position)[:, None], token)
        return torch.argmax(logits + torch.exp(-torch.exp(-gumbel)), -1).to(torch.int32)


class GreedyIsNoisy(ReferenceSampler):
    def draw(
        self, logits: Tensor, features: frozenset[str], sampling: SamplingTensors
    ) -> tuple[Tensor, Tensor]:
        if "sampled" in features:
            given = sampling["temperature"]
            sampling = {**sampling, "temperature": torch.where(given > 0, given, 1.0)}
        return super().draw(logits, features, sampling)


class VocabularyCutShort(ReferenceSampler):
    def draw(
        self, logits: Tensor, features: frozenset[str], sampling: SamplingTensors
    ) -> tuple[Tensor, Tensor]:
        if "sampled" not in features:
            return logits, torch.argmax(logits[:, :512], -1).to(torch.int32)
        return super().draw(logits, features, sampling)


class LogprobsUnasked(ReferenceSampler):
    def __call__(
        self, logits: Tensor, inputs: StepInputs, cache: Cache
    ) -> tuple[StepOutput, Cache]:
        output, cache = super().__call__(logits, inputs, cache)
        if output.logprob is None:
            more = reference.logprobs(logits, output.ids, self.max_logprobs)
            output = replace(output, **more)
        return output, cache


class FirstTokenRead(ReferenceBackend):
    def prepare(self, batch: StepBatch) -> Staged:
        if batch.bucket.phase is not Phase.DECODE:
            first = row_first(batch, "packed")[: batch.num_logits]
            index = batch.logit_index.copy()
            index[: len(first)] = first
            batch = replace(batch, logit_index=index)
        return super().prepare(batch)


class PenaltiesBySelf(ReferenceSampler):
    """Penalises by `penalise`, and leaves the reference nothing to penalise."""

    def __call__(
        self, logits: Tensor, inputs: StepInputs, cache: Cache
    ) -> tuple[StepOutput, Cache]:
        if "penalties" in inputs.features:
            sampling = inputs.sampling
            held = cache.counts.index_select(0, sampling["slot"])
            logits = self.penalise(logits, held, *sampling["penalties"][:, :, None].unbind(1))
            neutral = torch.tensor([1.0, 0.0, 0.0]).expand_as(sampling["penalties"])
            inputs = replace(inputs, sampling={**sampling, "penalties": neutral})
        return super().__call__(logits, inputs, cache)

    def penalise(
        self, logits: Tensor, held: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
    ) -> Tensor:
        raise NotImplementedError


class PenaltiesCountThePrompt(PenaltiesBySelf):
    def penalise(
        self, logits: Tensor, held: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
    ) -> Tensor:
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(held > 0, repeated, logits)
        drawn = (held & (IN_PROMPT - 1)) + (held >= IN_PROMPT)
        return logits - frequency * drawn - presence * (drawn > 0)


class RepetitionOfTheOutput(PenaltiesBySelf):
    def penalise(
        self, logits: Tensor, held: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
    ) -> Tensor:
        drawn = held & (IN_PROMPT - 1)
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(drawn > 0, repeated, logits)
        return logits - frequency * drawn - presence * (drawn > 0)


class RepetitionDividesAll(PenaltiesBySelf):
    def penalise(
        self, logits: Tensor, held: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
    ) -> Tensor:
        drawn = held & (IN_PROMPT - 1)
        logits = torch.where(held > 0, logits / repetition, logits)
        return logits - frequency * drawn - presence * (drawn > 0)


class NothingCounted(ReferenceSampler):
    def _keep(self, cache: Cache, slot: Tensor, ids: Tensor, *, counted: bool) -> Cache:
        return super()._keep(cache, slot, ids, counted=False)


class TargetsCounted(ReferenceSampler):
    def _keep(self, cache: Cache, slot: Tensor, ids: Tensor, *, counted: bool) -> Cache:
        sink = cache.last_ids.shape[0] - 1
        rows = torch.arange(len(slot), dtype=torch.int32).clamp(max=sink)
        return super()._keep(cache, torch.where(slot == sink, rows, slot), ids, counted=counted)


class LogprobsOfTheDrawn(ReferenceSampler):
    def __call__(
        self, logits: Tensor, inputs: StepInputs, cache: Cache
    ) -> tuple[StepOutput, Cache]:
        if "logprobs" in inputs.features:
            ones = torch.ones_like(inputs.sampling["of_drawn"])
            inputs = replace(inputs, sampling={**inputs.sampling, "of_drawn": ones})
        return super().__call__(logits, inputs, cache)


class RankFromZero(ReferenceSampler):
    def __call__(
        self, logits: Tensor, inputs: StepInputs, cache: Cache
    ) -> tuple[StepOutput, Cache]:
        output, cache = super().__call__(logits, inputs, cache)
        rank = None if output.rank is None else output.rank - 1
        return replace(output, rank=rank), cache


class BestUnsorted(ReferenceSampler):
    def __call__(
        self, logits: Tensor, inputs: StepInputs, cache: Cache
    ) -> tuple[StepOutput, Cache]:
        output, cache = super().__call__(logits, inputs, cache)
        if output.top_ids is None or output.top_logprobs is None:
            return output, cache
        order = output.top_ids.sort(-1)
        values = output.top_logprobs.gather(-1, order.indices)
        return replace(output, top_ids=order.values, top_logprobs=values), cache


class TargetsDrawn(ReferenceSampler):
    def __call__(
        self, logits: Tensor, inputs: StepInputs, cache: Cache
    ) -> tuple[StepOutput, Cache]:
        output, cache = super().__call__(logits, inputs, cache)
        if "targets" in inputs.features:
            best = torch.argmax(logits, -1).to(torch.int32)
            ids = torch.where(inputs.sampling["target"] >= 0, best, output.ids)
            output = replace(output, ids=ids)
        return output, cache


class BitsReversed(ReferenceSampler):
    def __call__(
        self, logits: Tensor, inputs: StepInputs, cache: Cache
    ) -> tuple[StepOutput, Cache]:
        if "bitmask" in inputs.features:
            token = torch.arange(logits.shape[-1])
            word = inputs.sampling["bitmask"].index_select(1, token // 32)
            off = ((word >> (31 - token % 32)) & 1) == 0
            logits = torch.where(off, MASKED, logits)
            whole = torch.full_like(inputs.sampling["bitmask"], -1)
            inputs = replace(inputs, sampling={**inputs.sampling, "bitmask": whole})
        return super().__call__(logits, inputs, cache)


class BiasReplaces(ReferenceSampler):
    def __call__(
        self, logits: Tensor, inputs: StepInputs, cache: Cache
    ) -> tuple[StepOutput, Cache]:
        if "bias" in inputs.features:
            ids = inputs.sampling["bias_ids"]
            named = torch.zeros(logits.shape[0], logits.shape[1] + 1)
            named.scatter_(1, torch.where(ids < 0, logits.shape[1], ids).long(), 1.0)
            logits = torch.where(named[:, :-1] > 0, 0.0, logits)
        return super().__call__(logits, inputs, cache)


class OnlyNanIsNotFinite(ReferenceSampler):
    def finite(self, logits: Tensor) -> Tensor:
        return ~torch.isnan(logits).any(-1)


class OneBadRowSpoilsAll(ReferenceSampler):
    def finite(self, logits: Tensor) -> Tensor:
        return super().finite(logits).all().expand(len(logits))


def _mutation(name: str, mistake: str, sampler: type[ReferenceSampler]) -> Mutation:
    return Mutation(
        name=name,
        area="sampling",
        mistake=mistake,
        plugin=lambda: ReferencePlugin(sampler=sampler),
    )


MUTATIONS: tuple[Mutation, ...] = (
    _mutation("vocabulary cut short", "ids from 512 on are never the best", VocabularyCutShort),
    _mutation("logprobs unasked", "a step that wants no logprobs gives some", LogprobsUnasked),
    Mutation(
        name="first token read",
        area="sampling",
        mistake="a prompt's logits are those of its first token",
        plugin=lambda: ReferencePlugin(backend=FirstTokenRead),
    ),
    _mutation("top-p cuts early", "the token that crosses p is left out", TopPCutsEarly),
    _mutation("top-k keeps one more", "k + 1 tokens are kept", TopKKeepsOneMore),
    _mutation("min-p of all", "min_p is a share of 1, not of the best token's", MinPOfAll),
    _mutation("typical is top-p", "the likely are kept, not the typical", TypicalKeepsTheLikely),
    _mutation(
        "filters before temperature",
        "filters see the distribution of before the temperature",
        FiltersBeforeTemperature,
    ),
    _mutation("high word ignored", "seeds above 32 bits draw as their low word", HighWordIgnored),
    _mutation("noise by row", "noise follows the row of the batch, not the position", NoiseByRow),
    _mutation("signed shift", "the sign is dragged into the bits of the noise", SignedShift),
    _mutation("uniform noise", "noise is uniform where Gumbel's is due", UniformNoise),
    _mutation("greedy is noisy", "rows of temperature 0 get noise beside others", GreedyIsNoisy),
    _mutation(
        "penalties count the prompt",
        "frequency and presence look at the prompt too",
        PenaltiesCountThePrompt,
    ),
    _mutation("repetition of the output", "repetition overlooks the prompt", RepetitionOfTheOutput),
    _mutation(
        "repetition divides all", "negative logits are divided and so rise", RepetitionDividesAll
    ),
    _mutation("nothing counted", "drawn tokens are not counted", NothingCounted),
    _mutation("targets counted", "a scored token counts as drawn by the row", TargetsCounted),
    _mutation(
        "logprobs of the drawn",
        "logprobs are of the distribution drawn from where raw ones are due",
        LogprobsOfTheDrawn,
    ),
    _mutation("rank from zero", "the best token has rank 0", RankFromZero),
    _mutation("best unsorted", "the best tokens come in the order of their ids", BestUnsorted),
    _mutation("targets drawn", "the id is drawn where a target is to be scored", TargetsDrawn),
    _mutation("bits reversed", "a bitmask's words are read from the highest bit", BitsReversed),
    _mutation("bias replaces", "a bias takes the logit's place", BiasReplaces),
    _mutation("only nan is not finite", "infinite logits pass as finite", OnlyNanIsNotFinite),
    _mutation("one bad row spoils all", "no row is finite where one is not", OneBadRowSpoilsAll),
)
