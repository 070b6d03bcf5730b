"""The format: what a byte stands for, and which byte a number gets."""

import torch

from chipset_abacus.beads import AbacusScheme, decode, encode, values

POWERS = {sign * 2.0**-power for sign in (1, -1) for power in range(8)}


def random_weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def numbers(packed: dict[str, torch.Tensor]) -> torch.Tensor:
    return decode(packed["weight"]) * packed["scale"][..., None]


def test_every_byte_is_a_sum_of_two_signed_powers_of_two() -> None:
    for byte, value in enumerate(values().tolist()):
        assert any(value - power in POWERS for power in POWERS), f"{byte} is {value}"


def test_a_number_gets_the_nearest_byte() -> None:
    weight = random_weight(5, 40)
    found = encode(weight)
    error = (numbers(found) - weight).abs()
    possible = (values() * found["scale"][:, None, None] - weight[..., None]).abs()
    torch.testing.assert_close(error, possible.amin(-1), rtol=0, atol=1e-6)


def test_what_two_beads_can_say_is_kept_exactly() -> None:
    weight = values()[torch.randint(256, (4, 300), generator=torch.Generator().manual_seed(2))]
    weight[:, 0] = 2  # the largest, so that the scale is 1
    found = encode(weight)
    assert torch.equal(numbers(found), weight)


def test_a_row_of_zeros_stays_zero() -> None:
    found = encode(torch.zeros(2, 8))
    assert torch.equal(numbers(found), torch.zeros(2, 8))


def test_experts_are_packed_one_by_one() -> None:
    weights = torch.stack([random_weight(3, 8), 5 * random_weight(3, 8)])
    for name, tensor in encode(weights).items():
        assert torch.equal(tensor[1], encode(weights[1])[name])


def test_projections_are_packed_and_nothing_else() -> None:
    name = "model.layers.0.mlp.down_proj"
    for is_stored, kinds in ((True, {"weight", "scale"}), (False, {"weight"})):
        scheme = AbacusScheme(is_stored=is_stored)
        assert set(scheme.stored(name, 8, 8) or ()) == kinds
        assert scheme.stored("lm_head", 8, 8) is None
        assert scheme.stored("model.embed_tokens", 8, 8) is None
