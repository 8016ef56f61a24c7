"""INT4: packing, both scale rules, and codes that come back from the weights whatever made them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k25sys.checkpoint import (
    SCALE_RULES,
    Int4Origin,
    dequantize_int4,
    int4,
    pack_int4,
    quantize_int4,
    recover_int4,
    unpack_int4,
)
from k25sys.errors import ArgumentValueError, DTypeError, ShapeError

DTYPES = (torch.bfloat16, torch.float32)
GROUPS = (  # codes of a group of 32, beside random ones
    [0] * 32, [1] + [0] * 31, [-1] * 32, [2] + [0] * 31, [-8] * 32, [7] * 32, [-8, 7] * 16, [0] * 31 + [-8],
    [4, 2] * 16, [3] * 32, [5, -5] * 16, [6, 3] * 16,
)  # fmt: skip
SCALES = (
    0.0, -0.0, 1.0, -0.0078125, 1e-5, 3e38, math.inf, -math.inf, math.nan, 9.2e-41, 1.2e-38, 0.0123, 1.0078125,
    1.1484375, 1.9921875,
)  # fmt: skip


def test_packing_is_least_significant_first_and_offset_by_eight() -> None:
    codes = torch.tensor([[-8, -7, 0, 7, 1, -1, 2, -2]])
    word = sum((int(code) + 8) << (4 * i) for i, code in enumerate(codes[0]))
    packed = pack_int4(codes)
    assert packed.dtype == torch.int32
    assert packed.item() == word - 2**32 * (word >= 2**31)
    every_word = torch.randint(-(2**31), 2**31, (50, 12)).int()
    assert torch.equal(pack_int4(unpack_int4(every_word)), every_word)


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_weights_are_near_and_within_the_rule(rule: str, dtype: torch.dtype) -> None:
    weight = (torch.randn(64, 96) * 0.02).to(dtype)
    packed, scales = quantize_int4(weight, rule)
    assert scales.dtype == torch.bfloat16
    assert packed.shape == (64, 12)
    assert scales.shape == (64, 3)
    codes = unpack_int4(packed)
    largest = weight.view(64, 3, 32).float().abs().amax(-1)
    assert torch.equal(scales, (largest / (7 if rule == "amax/7" else 7.5)).to(torch.bfloat16))
    assert int(codes.max()) == 7
    assert int(codes.min()) == (-7 if rule == "amax/7" else -8)
    error = (dequantize_int4(packed, scales, torch.float32) - weight.float()).abs().view(64, 3, 32)
    # Half a step; the largest weight of "amax/7.5" is clipped by half a step too, and a scale is rounded by 2^-9.
    assert (error <= scales.float().unsqueeze(-1) * (0.5 + 8 * 2**-8)).all()


def test_groups_of_zeros_have_a_scale_that_can_divide() -> None:
    for weight in (torch.zeros(1, 32), torch.full((1, 32), 1e-45)):
        packed, scales = quantize_int4(weight)
        assert (scales > 0).all()
        assert (dequantize_int4(packed, scales, torch.float32) == 0).all()


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_quantised_weights_are_recovered_without_remembering_any(rule: str, dtype: torch.dtype) -> None:
    packed, scales = quantize_int4((torch.randn(512, 256) * 0.02).to(dtype), rule)
    weight = dequantize_int4(packed, scales, dtype)
    origin = Int4Origin()
    origin.remember("w", weight, packed, scales)
    assert origin.odd["w"] is None
    assert_codes(origin, weight, packed, scales)
    other = next(r for r in SCALE_RULES if r != rule)
    assert not torch.equal(quantize_int4(weight, other)[0], packed)  # quantising again would not do


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(O, I) codes and (O, I / 32) bfloat16 scales, hostile groups among them."""
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    codes = torch.randint(-8, 8, (rows * groups, 32), generator=generator)
    scales = torch.rand(rows * groups, generator=generator) * 10.0 ** draw(st.integers(-41, 30))
    for i in range(rows * groups):
        codes[i] = torch.tensor(draw(st.sampled_from(GROUPS))) if draw(st.booleans()) else codes[i]
        scales[i] = draw(st.sampled_from(SCALES)) if draw(st.booleans()) else scales[i]
    return codes.view(rows, -1), scales.view(rows, -1).to(torch.bfloat16)


@settings(max_examples=300)
@given(matrix=matrices(), dtype=st.sampled_from(DTYPES))
def test_any_codes_and_scales_come_back(matrix: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    codes, scales = matrix
    packed = pack_int4(codes)
    weight = dequantize_int4(packed, scales, dtype)
    exact = codes.view(-1, 32).double() * scales.view(-1, 1).double()
    rounded = exact.to(dtype).double().view(codes.shape)
    torch.testing.assert_close(weight.double(), rounded, rtol=0.0, atol=0.0, equal_nan=True)
    origin = Int4Origin()
    origin.remember("w", weight, packed, scales)
    assert_codes(origin, weight, packed, scales)
    assert origin.codes_of("another", weight) is None


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_groups_that_need_no_search_are_recovered(dtype: torch.dtype) -> None:
    """Every mantissa of a scale, every pair of a largest code and another, at the ends of the range of scales."""
    least, most = (-14, 11) if dtype == torch.float16 else (-100, 99)
    mantissas = (torch.arange(128) | 0x3F80).to(torch.int16).view(torch.bfloat16)  # 1 to 2
    pairs = torch.tensor([(m, c) for m in (7, -7, -8) for c in range(-6, 7) if c])
    codes = torch.zeros(len(pairs), 128, 32, dtype=torch.int8)
    codes[:, :, 3], codes[:, :, 20] = pairs[:, :1], pairs[:, 1:]
    packed = pack_int4(codes.view(-1, 128 * 32))
    for exponent in (least, -6, 0, most):
        scales = (mantissas * 2.0**exponent).repeat(len(pairs), 1)
        weight = dequantize_int4(packed, scales, dtype)
        words, flat = packed.view(-1, 4), scales.view(-1)
        assert int4._surely_recovered(words, flat, dtype).all()
        found, found_scales = int4._recover_groups(weight)
        assert torch.equal(found, codes.view(-1, 32))
        assert torch.equal(found_scales, flat)


def test_loading_searches_few_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    search = int4._recover_groups

    def count(weight: Tensor) -> tuple[Tensor, Tensor]:
        searched.append(weight.numel() // 32)
        return search(weight)

    monkeypatch.setattr(int4, "_recover_groups", count)
    packed, scales = quantize_int4(torch.randn(512, 256))
    Int4Origin().remember("w", dequantize_int4(packed, scales), packed, scales)
    codes = torch.randint(-8, 8, (512, 256), generator=torch.Generator().manual_seed(0))
    packed, scales = pack_int4(codes), torch.full((512, 8), 0.0123, dtype=torch.bfloat16)
    Int4Origin().remember("w", dequantize_int4(packed, scales), packed, scales)
    assert searched[0] == 0
    assert searched[1] <= 4096 // 100  # (13 / 16) ** 32 of them have no code of 7 or 8


def assert_codes(origin: Int4Origin, weight: Tensor, packed: Tensor, scales: Tensor) -> None:
    found = origin.codes_of("w", weight)
    assert found is not None
    assert torch.equal(found[0], packed)
    assert torch.equal(found[1].view(torch.int16), scales.view(torch.int16))


@given(where=st.integers(0, 4 * 64 - 1), group=st.sampled_from(GROUPS), dtype=st.sampled_from(DTYPES))
def test_a_changed_weight_is_no_longer_the_loaded_one(where: int, group: list[int], dtype: torch.dtype) -> None:
    packed, scales = pack_int4(torch.tensor(group * 8).view(4, 64)), torch.full((4, 2), 0.0123, dtype=torch.bfloat16)
    weight = dequantize_int4(packed, scales, dtype)
    origin = Int4Origin()
    origin.remember("w", weight, packed, scales)
    weight.view(-1)[where] = 0.2718
    found = origin.codes_of("w", weight)
    # Four bits can hold some changed groups (one code alone): whatever is given back stands for these weights.
    assert found is None or torch.equal(dequantize_int4(*found, dtype), weight)
    assert found is not None or not torch.equal(dequantize_int4(packed, scales, dtype), weight)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ShapeError, match="multiple of 32"):
        quantize_int4(torch.zeros(2, 40))
    with pytest.raises(ArgumentValueError, match="NaN or infinity"):
        quantize_int4(torch.full((1, 32), math.nan))
    with pytest.raises(ArgumentValueError, match="'amax/8', accepted 'amax/7'"):
        quantize_int4(torch.zeros(2, 32), "amax/8")
    with pytest.raises(ShapeError, match="one for each group"):
        dequantize_int4(torch.zeros(2, 8, dtype=torch.int32), torch.zeros(2, 1))
    with pytest.raises(DTypeError, match="int32"):
        unpack_int4(torch.zeros(2, 8))
    with pytest.raises(ShapeError, match="multiple of 8"):
        pack_int4(torch.zeros(2, 9))


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("form", ["bfloat16", "float32", "bfloat16 widened"])
def test_codes_come_back_from_weights_alone(form: str, rule: str) -> None:
    """Codes of any origin, with nothing remembered: through another object, another layout, or float32."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(-8, 8, (64, 512), generator=generator, dtype=torch.int8)
    scales = (torch.rand(64, 16, generator=generator) * 0.02 + 1e-3).bfloat16()
    packed = pack_int4(codes)
    weight = dequantize_int4(packed, scales, torch.float32 if form == "float32" else torch.bfloat16)
    weight = weight.float() if form == "bfloat16 widened" else weight
    again, again_scales = recover_int4(weight, rule)
    assert torch.equal(again, packed)
    assert torch.equal(again_scales, scales)
    weight[3, 40] += 0.01  # a changed group is quantised by the rule, its neighbours stay
    changed, changed_scales = recover_int4(weight, rule)
    by_rule, rule_scales = quantize_int4(weight, rule)
    assert torch.equal(changed[3, 4:8], by_rule[3, 4:8])
    assert changed_scales[3, 1] == rule_scales[3, 1]
    changed[3, 4:8], changed_scales[3, 1] = packed[3, 4:8], scales[3, 1]
    assert torch.equal(changed, packed)
    assert torch.equal(changed_scales, scales)
