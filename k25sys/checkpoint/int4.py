"""Four-bit weights of the routed experts, as compressed-tensors' pack-quantized format keeps them.

Shapes: O output rows, I input columns, G = I / 32 groups of a row. A weight is code * scale of its group, the codes are
-8 to 7. Which rule made the scales is not recorded in a file and a reader need not know it.

A model holds the weights themselves. Codes and scales come back from them: `recover_int4` tries the few scales that
can have made a group, so that weights which were in four bits once are written as they were, whoever held them since.
It cannot where the weights do not tell (a group of zeros, a single code of 2 that may have been a 1 of twice the
scale): `Int4Origin` remembers those groups of a loaded model, and no others.
"""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from k25sys.errors import ArgumentValueError, DTypeError, ShapeError, message

GROUP = 32
CODES_PER_WORD = 8
SCALE_RULES = ("amax/7", "amax/7.5")
_DIVISORS = {"amax/7": (7.0, -7.0), "amax/7.5": (7.5, -8.0)}  # divisor and least code
_LARGEST_CODES = (7, 8, 6, 5, 4, 3, 2, 1)  # what the largest code of a group may be, the usual ones first
_LOWEST_BITS = 0x11111111  # of the eight nibbles of a word
_PROBED = 4  # columns of a group
_EMPTY_SCALE = 1.0  # of a group of zeros: 0 would be NaN for whoever divides by it


def pack_int4(codes_OI: Tensor) -> Tensor:
    """Packs eight codes into a word: code i of word j is column 8 j + i, bits 4 i to 4 i + 3, as code + 8.

    Args:
        codes_OI: (O, I) integers from -8 to 7; I is a multiple of 8.

    Returns:
        (O, I / 8) int32.

    Raises:
        ShapeError: not two dimensions, or I is no multiple of 8.
    """
    if codes_OI.dim() != 2 or codes_OI.shape[1] % CODES_PER_WORD:
        raise ShapeError(
            message("pack_int4", "codes_OI", f"shape {tuple(codes_OI.shape)}", "(O, I) with I a multiple of 8")
        )
    nibbles = (codes_OI + 8).to(torch.uint8)
    return (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(torch.int32)  # the lower byte is the first one


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: (O, I / 8) int32 to (O, I) int8 from -8 to 7.

    Raises:
        DTypeError, ShapeError: not int32 or not two dimensions.
    """
    if packed.dtype != torch.int32:
        raise DTypeError(message("unpack_int4", "packed", f"dtype {packed.dtype}", "int32"))
    if packed.dim() != 2:
        raise ShapeError(message("unpack_int4", "packed", f"shape {tuple(packed.shape)}", "(O, I / 8)"))
    pairs = packed.contiguous().view(torch.uint8)
    return (torch.stack((pairs & 15, pairs >> 4), -1).view(torch.int8) - 8).flatten(1)


def dequantize_int4(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """code * scale, rounded once to `dtype`.

    Args:
        packed: (O, I / 8) int32 of `pack_int4`.
        scales: (O, I / 32) bfloat16.

    Returns:
        (O, I) of `dtype`.

    Raises:
        DTypeError, ShapeError: a wrong dtype, or scales that do not belong to the codes.
    """
    codes = unpack_int4(packed)
    if scales.shape != (packed.shape[0], packed.shape[1] * CODES_PER_WORD // GROUP) or codes.shape[1] % GROUP:
        want = f"({packed.shape[0]}, {packed.shape[1] / 4:g}), one for each group of 32 columns"
        raise ShapeError(message("dequantize_int4", "scales", f"shape {tuple(scales.shape)}", want))
    groups = codes.view(-1, GROUP).float() * scales.reshape(-1, 1).float()
    return groups.to(dtype).view(codes.shape)


def check_scale_rule(op: str, scale_rule: str) -> None:
    """Raises unless `scale_rule` is one of SCALE_RULES."""
    if scale_rule not in SCALE_RULES:
        raise ArgumentValueError(message(op, "scale_rule", repr(scale_rule), " or ".join(map(repr, SCALE_RULES))))


def quantize_int4(weight_OI: Tensor, scale_rule: str = "amax/7") -> tuple[Tensor, Tensor]:
    """Rounds a weight to codes with a scale for each group of 32 columns.

    Args:
        weight_OI: (O, I) float; I is a multiple of 32.
        scale_rule: "amax/7": scale = largest magnitude / 7, codes -7 to 7, as quantisation-aware training of K2 does.
            "amax/7.5": codes -8 to 7, as compressed-tensors' min-max observer does.

    Returns:
        packed (O, I / 8) int32 and scales (O, I / 32) bfloat16. A group whose scale would be 0 has scale 1.

    Raises:
        ShapeError, ArgumentValueError: a wrong shape, an unknown rule, or a weight that is not finite.
    """
    check_scale_rule("quantize_int4", scale_rule)
    if weight_OI.dim() != 2 or weight_OI.shape[1] % GROUP:
        got = f"shape {tuple(weight_OI.shape)}"
        hint = 'widths that are no multiple of 32 are saved with experts="bf16"'
        raise ShapeError(message("quantize_int4", "weight_OI", got, "(O, I) with I a multiple of 32", hint))
    groups = weight_OI.reshape(-1, GROUP).float()
    largest = groups.abs().amax(1, keepdim=True)
    if not largest.isfinite().all():
        raise ArgumentValueError(message("quantize_int4", "weight_OI", "NaN or infinity", "finite weights"))
    divisor, least = _DIVISORS[scale_rule]
    scales = (largest / divisor).to(torch.bfloat16)
    scales = torch.where(scales == 0, _EMPTY_SCALE, scales)
    codes = (groups / scales.float()).round().clamp(least, 7).to(torch.int8)
    return pack_int4(codes.view(weight_OI.shape)), scales.view(weight_OI.shape[0], -1)


def recover_int4(weight_OI: Tensor, scale_rule: str = "amax/7") -> tuple[Tensor, Tensor]:
    """Codes and scales that give a weight exactly, group by group; `quantize_int4` for the groups that have none.

    Float32 weights may be exact products, or such that were rounded to bfloat16 on the way.

    Args, Returns, Raises: as `quantize_int4`.
    """
    packed, rule_scales = quantize_int4(weight_OI, scale_rule)
    codes, scales = unpack_int4(packed).view(-1, GROUP), rule_scales.reshape(-1)
    narrow = weight_OI.to(torch.bfloat16)
    forms = [narrow, weight_OI] if weight_OI.dtype != torch.bfloat16 else [weight_OI]
    for form in forms:  # the form of more digits last: where both fit it tells more
        found_codes, found_scales = _recover_groups(form)
        exact = (found_codes.float() * found_scales.float().unsqueeze(1)).to(form.dtype).to(weight_OI.dtype)
        fits = (exact == weight_OI.reshape(-1, GROUP)).all(1) & (found_codes != 0).any(1)
        codes, scales = torch.where(fits[:, None], found_codes, codes), torch.where(fits, found_scales, scales)
    return pack_int4(codes.view(weight_OI.shape)), scales.view(weight_OI.shape[0], -1)


@dataclass(frozen=True, kw_only=True)
class OddGroups:
    """Groups of one expert matrix that its weights do not tell: numbers row * G + g (N,) int64, codes (N, 32) int8,
    scales (N,) bfloat16."""

    numbers: Tensor
    codes: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Int4Origin:
    """The expert matrices that were loaded from four-bit codes, by released name, each with the groups that cannot be
    recovered from the weights, or None. `load_hf` attaches one to the model as `model.int4_origin`, for `save_hf`."""

    odd: dict[str, OddGroups | None] = field(default_factory=dict)

    def remember(self, name: str, weight_OI: Tensor, packed: Tensor, scales: Tensor) -> None:
        """Notes that `weight_OI` is `dequantize_int4(packed, scales, weight_OI.dtype)`.

        Searches only the groups that may be odd, few in a real matrix: the search takes as long as all else together.
        """
        words, scales = packed.reshape(-1, GROUP // CODES_PER_WORD), scales.reshape(-1)
        numbers = (~_surely_recovered(words, scales, weight_OI.dtype)).nonzero().squeeze(1)
        codes, scales = unpack_int4(words[numbers]), scales[numbers]
        found, found_scales = _recover_groups(weight_OI.reshape(-1, GROUP)[numbers])
        odd = (found != codes).any(1) | (_bits(found_scales) != _bits(scales))
        # Nothing small is kept where nothing is odd: it would pin the memory of the large tensors freed around it.
        self.odd[name] = None
        if odd.any():
            self.odd[name] = OddGroups(numbers=numbers[odd], codes=codes[odd], scales=scales[odd])

    def codes_of(self, name: str, weight_OI: Tensor) -> tuple[Tensor, Tensor] | None:
        """The codes (O, I / 8) and scales (O, I / 32) that a matrix was loaded from, or None if it was not, or if it
        has changed since."""
        if name not in self.odd:
            return None
        codes, scales = _recover_groups(weight_OI)
        odd = self.odd[name]
        if odd is not None:
            codes[odd.numbers], scales[odd.numbers] = odd.codes, odd.scales
        packed, scales = pack_int4(codes.view(weight_OI.shape)), scales.view(weight_OI.shape[0], -1)
        same = torch.equal(_bits(dequantize_int4(packed, scales, weight_OI.dtype)), _bits(weight_OI.contiguous()))
        return (packed, scales) if same else None


def _bits(x: Tensor) -> Tensor:
    """The bits of x, so that NaN equals itself and -0 is not 0."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _surely_recovered(words: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Which groups (words (groups, 4) int32, scales (groups,)) `_recover_groups` gives back as they are; no false yes.

    Those with a code of magnitude 7 or 8 and another of 1 to 6, and a scale whose products neither overflow nor lose
    digits: no other pair that is tried before the true one gives the same weights, for any of a scale's 128 mantissas.
    """
    b1, b2, b3 = words >> 1, words >> 2, words >> 3  # bit i of every nibble in the nibble's lowest place
    largest = (words & b1 & b2 & b3) | ~(b1 | b2 | b3)  # 15, or 0 and 1: codes 7, -8 and -7
    zero = b3 & ~(words | b1 | b2)
    has_largest = (largest & _LOWEST_BITS).any(1)
    has_between = (~(largest | zero) & _LOWEST_BITS).any(1)
    least, most = (2.0**-14, 2.0**12) if dtype == torch.float16 else (2.0**-100, 2.0**100)
    return has_largest & has_between & (scales >= least) & (scales <= most)


def _recover_groups(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """For each group the first pair of codes and scale that gives its weights exactly.

    Returns:
        codes (groups, 32) int8, scales (groups,) bfloat16; zeros and 1 where no pair does.
    """
    bits = _bits(weight_OI.reshape(-1, GROUP))
    values = weight_OI.reshape(-1, GROUP).float()
    largest = values.abs().amax(1)
    codes = torch.zeros(values.shape, dtype=torch.int8)
    scales = torch.full_like(largest, _EMPTY_SCALE, dtype=torch.bfloat16)
    numbers = ((bits != 0).any(1) & largest.isfinite()).nonzero().squeeze(1)
    values, bits, largest = values[numbers], bits[numbers], largest[numbers]
    # The largest weight was rounded, so that its scale may be a neighbour of the quotient.
    for code, step in itertools.product(_LARGEST_CODES, (0, -1, 1)):
        scale = ((largest / code).to(torch.bfloat16).view(torch.int16) + step).view(torch.bfloat16)
        # Of weights that were never in four bits a few columns tell; only where they fit, all are looked at.
        _, likely = _codes_at(scale, values[:, :_PROBED], bits[:, :_PROBED], weight_OI.dtype)
        rows = likely.nonzero().squeeze(1)
        guess, fits = _codes_at(scale[rows], values[rows], bits[rows], weight_OI.dtype)
        rows = rows[fits]
        if not len(rows):
            continue
        codes[numbers[rows]], scales[numbers[rows]] = guess[fits].to(torch.int8), scale[rows]
        left = torch.ones(len(numbers), dtype=torch.bool)
        left[rows] = False
        numbers, values, bits, largest = (x[left] for x in (numbers, values, bits, largest))
    return codes, scales


def _codes_at(scale: Tensor, values: Tensor, bits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For each row of `values` its codes at a scale, as floats, and whether they give `bits`, the values in `dtype`."""
    wide = scale.float().unsqueeze(1)
    guess = (values / wide).round() + 0.0  # code 0 has no sign
    in_range = ((guess >= -8) & (guess <= 7)).all(1)
    return guess, (_bits((guess * wide).to(dtype)) == bits).all(1) & in_range
