"""The one decoder: every family is this module with other flags."""

from __future__ import annotations

from torch import Tensor, nn

from ...backends.kv_cache import Cache
from ...backends.sampler import Sampler
from ...backends.step import StepInputs
from ..layers.attention import Attention
from ..layers.embedding import Embedding, Head
from ..layers.mlp import MLP
from ..layers.moe import MoE
from ..layers.norm import Norm
from ..layers.rotary import Rotary


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm; sandwiched, each before another one too.

    The residual travels beside x and is added inside the next norm, where the backend may fuse the two.
    """

    def __init__(
        self,
        *,
        attention_norm: Norm,
        attention: Attention,
        attention_post_norm: Norm | None,
        mlp_norm: Norm,
        mlp: MLP | MoE,
        mlp_post_norm: Norm | None,
        rotary: int | None,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.attention_post_norm = attention_post_norm
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.mlp_post_norm = mlp_post_norm
        self.rotary = rotary
        """Which of the decoder's rotations; None = none."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotations: list[tuple[Tensor, Tensor]],
        inputs: StepInputs,
        cache: Cache,
    ) -> tuple[Tensor, Tensor, Cache]:
        """x, residual [T, H] -> the same, with x not yet added to the residual."""
        if residual is None:
            residual, x = x, self.attention_norm(x)
        else:
            x, residual = self.attention_norm.add(x, residual)
        rotation = None if self.rotary is None else rotations[self.rotary]
        x, cache = self.attention(x, rotation, inputs, cache)
        if self.attention_post_norm is not None:
            x = self.attention_post_norm(x)
        x, residual = self.mlp_norm.add(x, residual)
        x = self.mlp(x)
        if self.mlp_post_norm is not None:
            x = self.mlp_post_norm(x)
        return x, residual, cache


class Decoder(nn.Module):
    """(StepInputs, Cache) -> (logits f32 [L, V], Cache)."""

    def __init__(
        self,
        *,
        sampler: Sampler,
        embedding: Embedding,
        embedding_norm: Norm | None,
        rotaries: list[Rotary],
        layers: list[DecoderLayer],
        norm: Norm,
        head: Head,
    ) -> None:
        super().__init__()
        self.sampler = sampler
        self.embedding = embedding
        self.embedding_norm = embedding_norm
        self.rotaries = nn.ModuleList(rotaries)
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.head = head

    def forward(self, inputs: StepInputs, cache: Cache) -> tuple[Tensor, Cache]:
        """The last norm and the head see only the rows that logits are wanted of."""
        x = self.embedding(self.sampler.feed(inputs, cache))
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        positions = inputs.positions.reshape(-1)  # text has one axis
        rotations = [rotary(positions) for rotary in self.rotaries]
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual, cache = layer(x, residual, rotations, inputs, cache)
        assert residual is not None  # there is at least one layer
        x = x.index_select(0, inputs.logit_index)
        x, _ = self.norm.add(x, residual.index_select(0, inputs.logit_index))
        return self.head(x), cache
