"""Words written bit by bit, and what they are worth by hand."""

from __future__ import annotations

import torch

from chipset.core.quantization.awq import AwqFormat
from chipset.core.quantization.canonical import dequantise
from chipset.core.quantization.fp8 import Fp8Format
from chipset.core.quantization.gptq import GptqFormat

AWQ = {"bits": 4, "group_size": 2, "version": "GEMM", "zero_point": True}
GPTQ = {"bits": 4, "group_size": 8, "desc_act": False, "sym": False}


def word(hexadecimal: int) -> int:
    """As an int32."""
    return hexadecimal - 2**32 if hexadecimal >= 2**31 else hexadecimal


def test_awq_puts_even_outputs_in_the_low_half_of_a_word() -> None:
    """A word of outputs 0 to 7 is, from its highest nibble down: 7 5 3 1 6 4 2 0."""
    tensors = {
        # input 0: output n is n. Input 1: output n is 15 - n
        "qweight": torch.tensor([[word(0x7531_6420)], [word(0x8ACE_9BDF)]], dtype=torch.int32),
        # output n has the zero point 8 - n
        "qzeros": torch.tensor([[word(0x1357_2468)]], dtype=torch.int32),
        "scales": torch.tensor([[1, 2, 4, 8, 16, 32, 64, 128]], dtype=torch.float16),
    }
    scale = [1, 2, 4, 8, 16, 32, 64, 128]
    wanted = [[scale[n] * (n - (8 - n)), scale[n] * ((15 - n) - (8 - n))] for n in range(8)]
    found = dequantise(AwqFormat().read(AWQ).pack("layer", tensors))
    assert found.tolist() == wanted


def gptq_words(zeros: int) -> dict[str, torch.Tensor]:
    """Eight inputs of output 0 are 0 to 7 and those of output 1 are 15 to 8; other outputs hold nothing but 0."""
    qweight = torch.zeros(1, 8, dtype=torch.int32)
    qweight[0, 0], qweight[0, 1] = word(0x7654_3210), word(0x89AB_CDEF)
    return {
        "qweight": qweight,
        "qzeros": torch.tensor([[word(zeros)]], dtype=torch.int32),
        "scales": torch.tensor([[1, 2, 1, 1, 1, 1, 1, 1]], dtype=torch.float16),
    }


def test_gptq_puts_the_first_input_lowest_and_stores_zero_points_less_one() -> None:
    """Output 0 has stored 3 and output 1 has 5: they are 4 and 6."""
    found = dequantise(GptqFormat().read(GPTQ).pack("layer", gptq_words(0x53)))
    assert found[0].tolist() == [q - 4 for q in range(8)]
    assert found[1].tolist() == [2 * (15 - q - 6) for q in range(8)]


def test_gptq_v2_stores_zero_points_as_they_are() -> None:
    config = GPTQ | {"checkpoint_format": "gptq_v2"}
    found = dequantise(GptqFormat().read(config).pack("layer", gptq_words(0x53)))
    assert found[0].tolist() == [q - 3 for q in range(8)]
    assert found[1].tolist() == [2 * (15 - q - 5) for q in range(8)]


def test_the_zero_point_0_less_one_is_15() -> None:
    found = dequantise(GptqFormat().read(GPTQ).pack("layer", gptq_words(0xF)))
    assert found[0].tolist() == list(range(8))


def test_gptqmodel_takes_one_from_whole_words() -> None:
    """Zero points 0 and 5 are 0x50; less 0x11 that is 0x3F, for the 0 borrows from the 5."""
    config = GPTQ | {"meta": {"quantizer": ["gptqmodel:5.0.0"]}}
    found = dequantise(GptqFormat().read(config).pack("layer", gptq_words(0x3F)))
    assert found[0].tolist() == list(range(8))
    assert found[1].tolist() == [2 * (15 - q - 5) for q in range(8)]


def test_gptq_of_8_bits_counts_from_0_to_255() -> None:
    config = GPTQ | {"bits": 8, "group_size": 4}
    tensors = {
        # inputs 0 to 3 of output 0 are 0, 127, 128 and 255
        "qweight": torch.tensor([[word(0xFF80_7F00), 0, 0, 0]], dtype=torch.int32),
        # and its zero point, stored less one, is 128
        "qzeros": torch.tensor([[word(0x7F7F_7F7F)]], dtype=torch.int32),
        "scales": torch.full((1, 4), 0.5, dtype=torch.float16),
    }
    packed = GptqFormat().read(config).pack("layer", tensors)
    assert packed.tensors["weight"][0].tolist() == [-128, -1, 0, 127]
    assert dequantise(packed)[0].tolist() == [-64.0, -0.5, 0.0, 63.5]


def test_g_idx_is_the_group_of_each_input() -> None:
    config = GPTQ | {"group_size": 4, "desc_act": True}
    tensors = gptq_words(0) | {
        "qzeros": torch.zeros(2, 1, dtype=torch.int32),  # all are 1
        "scales": torch.tensor([[1.0] * 8, [10.0] * 8], dtype=torch.float16),
        "g_idx": torch.tensor([1, 0, 1, 0, 0, 1, 0, 1], dtype=torch.int32),
    }
    packed = GptqFormat().read(config).pack("layer", tensors)
    assert dequantise(packed)[0].tolist() == [-10, 0, 10, 2, 3, 40, 5, 60]
    # columns lie group by group
    assert packed.tensors["order"].tolist() == [1, 3, 4, 6, 0, 2, 5, 7]


def test_an_fp8_number_is_its_bits_times_the_scale_of_its_block() -> None:
    config = {"quant_method": "fp8", "weight_block_size": [2, 2], "activation_scheme": "dynamic"}
    # e4m3fn: sign, 4 bits of exponent with bias 7, 3 of mantissa
    one, seven_sixteenths, largest, least = 0x38, 0x2E, 0x7E, 0x81
    octets = torch.tensor([[one, seven_sixteenths, largest], [least, one, one], [one, one, one]])
    tensors = {
        "weight": octets.to(torch.uint8).view(torch.float8_e4m3fn),
        "weight_scale_inv": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    }
    found = dequantise(Fp8Format().read(config).pack("layer", tensors))
    assert found.tolist() == [[1, 7 / 16, 896], [-(2.0**-9), 1, 2], [3, 3, 4]]
