r"""Final answers out of replies, and whether two of them are the same value: numbers, fractions, LaTeX arithmetic.

Values are exact fractions as long as nothing irrational occurs. Source of the conventions: Hendrycks et al., MATH
(arXiv 2103.03874): the last \boxed{} is the answer; units, degree and percent signs and thousands' commas do not count.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

_LONGEST = 1000  # characters of an answer that is read as arithmetic
_DEEPEST = 20
_MOST_BITS = 4096  # of an exact value; larger ones become floats
_LARGEST_FACTORIAL = 500  # and the largest n of n over k: below 2^_MOST_BITS both
_LARGEST_BINOMIAL = 4000
# \uff1a is the full-width colon, \u2212 the minus sign, \u2013 a dash. Repeats are bounded: replies may be degenerate.
_STATED = re.compile(
    r"(?i:\banswer)[*_]{0,4}\s{0,4}(?:(?i:is)\b\s{0,4}[*_]{0,4}[:\uff1a]?|[*_]{0,4}[:\uff1a])"
    r"[*_ \t]{0,8}(?P<answer>[^\n]+)"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_NUMBER = re.compile(
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d*)?(?:[eE][+-]?\d{1,3}(?!\d))?|\.\d+(?:[eE][+-]?\d{1,3}(?!\d))?"
)
_IN_PROSE = re.compile(rf"(?<![\w.])[-\u2212]?(?:{_NUMBER.pattern})(?:\s*/\s*\d+)?(?![\w^]|\.\d)")
_PLAIN = re.compile(rf"\s*\$?\s*(?P<number>[-\u2212+]?(?:{_NUMBER.pattern}))\s*(?P<percent>%?)\s*\.?\s*")
_SPACES = re.compile(r"\\[!,;: ]|~|\\q?quad\b|\\left\b|\\right\b|\\displaystyle\b|\$")
_NAME = re.compile(r"^\s*[A-Za-z](?:_\{?\w+\}?)?\s*=\s*")
_OR = re.compile(
    r"(?:,\s{0,4})?(?:\\(?:text|mathrm|mbox|textrm)\s?\{\s{0,4}(?:or|and)\s{0,4}\}|(?<=[\s,])(?:or|and)(?=\s))"
)
_LOGARITHM_OF_ONE = re.compile(r"\\ln(?:\(([A-Za-z]|\d+)\)|\{([A-Za-z]|\d+)\})")
_MIXED = re.compile(r"(?<![\d.])(\d{1,30})\s+(\d{1,30})\s*/\s*(\d{1,30})(?![\d.])")
_SHORT_UNITS = (
    "mm|cm|dm|km|m|mg|kg|g|ms|min|s|h|ml|mL|L|ft|in|lb|oz|mph|km/h|m/s|Hz|kHz|MHz|N|J|kJ|W|kW|V|A|K|Pa|kPa|mol|deg"
)
_UNIT = re.compile(
    r"\s*(?P<unit>\\%|%|°C?|\^\{?\\circ\}?C?|\\degree|\\(?:text|mathrm|mbox|textrm)\{[^{}]*\}"
    rf"|(?<![A-Za-z\\])(?:{_SHORT_UNITS}|(?<=\s)[A-Za-z]{{2,}}(?: [A-Za-z]+)*))(?P<power>\^\{{?-?\d\}}?|[²³])?\s*\.?$"
)
_SPELLINGS = (
    (r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\cfrac", r"\frac"), (r"\dbinom", r"\binom"),
    (r"\tbinom", r"\binom"), ("\u2212", "-"), ("\u2013", "-"),
    (r"\cdot", "*"), (r"\times", "*"), ("\u00d7", "*"), ("·", "*"), (r"\div", "/"), ("÷", "/"), ("π", r"\pi "),
    ("√", r"\sqrt "), ("**", "^"),
)  # fmt: skip

_FACTORS = (r"\sqrt", r"\pi", r"\frac", r"\binom", r"\ln")  # multiply what is before them

Value = Fraction | float
Quantity = tuple[Value, str]
"""A value and its unit."""


def final_answer(reply: str) -> str:
    r"""What a reply gives as its answer: the last \boxed{}, else the line after the last "answer is" or "answer:", else
    all of it. Where the last box is not closed, the reply was cut and has no answer: "".
    """
    return _stated_answer(reply)[0]


def numeric_equal(reply: str, answer: str, *, decimals: int | None = None) -> bool:
    r"""Whether the final answer of `reply` has the value of `answer`.

    1/2, 0.5, .50, \frac{1}{2}, 50/100 and 5e-1 are one value; 1,234 is 1234; 1 1/2 and 1\frac12 are 3/2. Units count
    only where both have one. Of "m + n = 73" the right side counts. In a reply without a box that is not a value as a
    whole, the last number of its last line (or of the line that states the answer) counts, and "5!" may also be an
    exclamation. Nothing, NaN and infinity are no value, and equal to nothing.

    Args:
        reply: any text.
        answer: a value.
        decimals: compare after rounding both to so many decimals (half to even), where the question asks for that.
    """
    wanted = _quantity(answer)
    if wanted is None:
        return False
    for got in _readings(reply):
        if not _units_agree(got[1], wanted[1]):
            continue
        if decimals is None:
            same = _same_value(got[0], wanted[0])
        else:
            same = round(Fraction(got[0]), decimals) == round(Fraction(wanted[0]), decimals)
        if same:
            return True
    return False


def math_equal(reply: str, answer: str) -> bool:
    r"""Whether the final answer of `reply` is `answer`: the same value, the same list of values, or the same LaTeX.

    Lists without brackets ("1, 2") are equal in any order, those in brackets in theirs, and brackets must agree:
    (1, 2] is not [1, 2]; "1 or 2" and "1 and 2" are "1, 2". What is no arithmetic (a variable, a set's name) is
    compared character by character, spaces and LaTeX's variants of size aside; of an equation in the reply its right
    side may be the answer. Expressions in variables that are equal by algebra alone are not recognised.
    """
    if numeric_equal(reply, answer):
        return True
    text = final_answer(reply)
    return _same_list(text, answer) or _same_list(_right_side(text), answer)


def is_value(text: str) -> bool:
    """Whether `text` is arithmetic with a finite value, a unit behind it or not."""
    return _quantity(text) is not None


def plain_number(text: str) -> Fraction | None:
    """A decimal number with or without thousands' commas, a dollar before it or a percent sign behind it (/ 100)."""
    match = _PLAIN.fullmatch(text) if len(text) <= _LONGEST else None
    if not match:
        return None
    value = Fraction(match["number"].replace(",", "").replace("\u2212", "-"))
    return value / 100 if match["percent"] else value


def _stated_answer(reply: str) -> tuple[str, bool]:
    """The final answer, and whether it stood in a box."""
    boxes = list(_BOX.finditer(reply))
    if boxes:
        start = boxes[-1].end()
        end = _closing(reply, start)
        return (reply[start:end].strip() if end is not None else ""), True
    stated = list(_STATED.finditer(reply))
    text = stated[-1]["answer"] if stated else reply
    return text.strip().strip("*_").removesuffix(".").strip("*_ "), False


def _closing(text: str, start: int) -> int | None:
    """Where the brace that was opened before `start` is closed."""
    depth = 1
    for i in range(start, len(text)):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return i
    return None


def _readings(reply: str) -> list[Quantity]:
    """The values that the final answer of a reply may have."""
    text, is_boxed = _stated_answer(reply)
    texts = [text] if is_boxed or not text.endswith("!") else [text, text[:-1]]
    found = [value for each in texts if (value := _quantity(each) or _quantity(_right_side(each))) is not None]
    if found or is_boxed:
        return found
    lines = text.strip().splitlines()
    numbers = _IN_PROSE.findall(lines[-1][-_LONGEST:]) if lines else []
    value = _quantity(numbers[-1]) if numbers else None
    return [] if value is None else [value]


def _right_side(text: str) -> str:
    r"""What is right of the last "=" outside brackets; "" in a list and where there is none.

    <=, >= and \not= are other signs, and so is != but for the factorial's: in n!=6 it touches the n.
    """
    if len(text) > _LONGEST or len(_list_of(text)[1]) > 1:
        return ""
    depth, last = 0, None
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "=" and depth == 0 and not text.endswith(("<", ">", r"\not", " !"), 0, i):
            last = i
    return "" if last is None else text[last + 1 :]


def _quantity(text: str) -> Quantity | None:
    if len(text) > _LONGEST or "\n" in text.strip():
        return None
    text = _NAME.sub("", _SPACES.sub(" ", text.replace(r"\$", "").replace("{,}", ",")).strip()).removesuffix(".")
    match = _UNIT.search(text)
    unit = ""
    if match and match.start() > 0:
        unit, text = _plain_unit(match), text[: match.start()]
    text = _MIXED.sub(r"(\1+\2/\3)", text.strip().lstrip("€£¥").strip())
    try:
        value = _Arithmetic(text).value()
        finite = isinstance(value, Fraction) or math.isfinite(value)
    except (ValueError, ArithmeticError):
        return None
    return (value, unit) if finite else None


def _plain_unit(match: re.Match[str]) -> str:
    inside = re.sub(r"\\(?:text|mathrm|mbox|textrm)\{([^{}]*)\}", r"\1", match["unit"]).strip()
    power = re.sub(r"[\^{}]", "", match["power"] or "").replace("²", "2").replace("³", "3")
    named = {"degrees": "°", "degree": "°", "deg": "°", r"\degree": "°", "percent": "%", r"\%": "%"}
    inside = named.get(inside, inside)
    if "\\circ" in inside:
        inside = "°C" if inside.endswith("C") else "°"
    return (inside[:-1] if len(inside) > 3 and inside.endswith("s") else inside) + power


def _units_agree(first: str, second: str) -> bool:
    return not first or not second or first == second


def _same_value(first: Value, second: Value) -> bool:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first == second
    try:
        return math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-12)
    except OverflowError:
        return False


def _same_list(first: str, second: str) -> bool:
    got, wanted = _list_of(first), _list_of(second)
    if len(got[1]) != len(wanted[1]) or got[0] != wanted[0]:
        return False
    if wanted[0]:
        return all(_same_item(a, b) for a, b in zip(got[1], wanted[1], strict=True))
    left = list(wanted[1])
    for item in got[1]:
        found = next((i for i, other in enumerate(left) if _same_item(item, other)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def _same_item(first: str, second: str) -> bool:
    """Whether an item of a reply is one of the answer."""
    side = _right_side(first)
    a, b = _quantity(first) or _quantity(side), _quantity(second)
    if a is not None and b is not None:
        return _units_agree(a[1], b[1]) and _same_value(a[0], b[0])
    return bool(_latex(second)) and _latex(second) in (_latex(first), _latex(side))


def _latex(text: str) -> str:
    text = re.sub(r"\\[dtc]frac\b", r"\\frac", _SPACES.sub("", text)).replace("\u2212", "-")
    return _LOGARITHM_OF_ONE.sub(r"\\ln\1\2", "".join(text.split())).removesuffix(".")


def _list_of(text: str) -> tuple[str, list[str]]:
    """The brackets around a list ("" for none) and its items, split at the commas of no inner bracket."""
    text = _OR.sub(",", _SPACES.sub(" ", text)).replace(r"\{", "{").replace(r"\}", "}").strip()
    text = _NAME.sub("", text).removesuffix(".")
    brackets = ""
    if len(text) > 1 and text[0] in "([{" and text[-1] in ")]}" and _is_outer(text):
        brackets, text = text[0] + text[-1], text[1:-1]
    items, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and (character in ",;"):
            items.append(text[start:i])
            start = i + 1
    items.append(text[start:])
    if brackets == "{}":  # a set: in any order
        brackets = ""
    return (brackets if len(items) > 1 else ""), [item.strip() for item in items]


def _is_outer(text: str) -> bool:
    """Whether the first bracket is closed by the last."""
    counts = Counter()
    for i, character in enumerate(text):
        counts["open"] += (character in "([{") - (character in ")]}")
        if counts["open"] == 0:
            return i == len(text) - 1
    return False


class _Arithmetic:
    """Reads + - * / ^ !, fractions, roots, binomials, ln, pi and brackets from left to right.

    ValueError where it is anything else.
    """

    def __init__(self, text: str) -> None:
        for old, new in _SPELLINGS:
            text = text.replace(old, new)
        self.text, self.at, self.depth = text, 0, 0

    def value(self) -> Value:
        found = self._sum()
        if self._next():
            raise ValueError(f"{self.text[self.at :]!r} behind the value")
        return found

    def _next(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def _take(self, literal: str) -> bool:
        self._next()
        if not self.text.startswith(literal, self.at):
            return False
        self.at += len(literal)
        return True

    def _sum(self) -> Value:
        with self._deeper():
            total = self._product()
            while (sign := self._next()) and sign in "+-":
                self.at += 1
                term = self._product()
                total = _bounded(total + term if sign == "+" else total - term)
        return total

    @contextmanager
    def _deeper(self) -> Iterator[None]:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ValueError("nested too deeply")
        yield
        self.depth -= 1

    def _product(self) -> Value:
        total = self._signed()
        while True:
            if self._take("*"):
                total *= self._signed()
            elif self._take("/"):
                total /= self._signed()
            elif self._is_factor():
                total *= self._power()
            else:
                return total
            total = _bounded(total)

    def _is_factor(self) -> bool:
        """Whether what is next multiplies without a sign: a bracket, a command, a number behind a factorial (3!2!)."""
        following = self._next()
        if following.isdigit():
            return self.text[: self.at].rstrip().endswith("!")
        return bool(following) and (following in "({" or self.text.startswith(_FACTORS, self.at))

    def _signed(self) -> Value:
        negative = False
        while (sign := self._next()) and sign in "+-":
            self.at += 1
            negative ^= sign == "-"
        found = self._power()
        return -found if negative else found

    def _power(self) -> Value:
        base = self._atom()
        if self._take("!"):
            base = _factorial(base)  # n!! and 2^3!, read in two ways, leave a "!" over: no value
        if not self._take("^"):
            return base
        return _raised(base, self._group() if self._next() == "{" else self._signed_atom())

    def _signed_atom(self) -> Value:
        negative = self._take("-")
        found = self._atom()
        return -found if negative else found

    def _atom(self) -> Value:
        if self._take("("):
            return self._closed(")")
        if self._next() == "{":
            return self._group()
        if self._take(r"\frac"):
            return self._argument() / self._argument()
        if self._take(r"\sqrt"):
            degree = self._closed("]") if self._take("[") else Fraction(2)
            return _root(self._argument(), degree)
        if self._take(r"\binom"):
            return _binomial(self._argument(), self._argument())
        if self._take(r"\ln"):
            return self._logarithm()
        if self._take(r"\pi"):
            return math.pi
        match = _NUMBER.match(self.text, self.at)
        if not match:
            raise ValueError(f"no value at {self.text[self.at :]!r}")
        self.at = match.end()
        whole = Fraction(match.group().replace(",", ""))
        if self.text.startswith(r"\frac", self.at) and whole.denominator == 1:  # 2\frac{1}{2}: a mixed number
            self.at += len(r"\frac")
            return whole + self._argument() / self._argument()
        return whole

    def _logarithm(self) -> Value:
        r"""\ln(2), \ln 2, \ln 2^3, which is ln(8). \ln 2\pi is read in two ways: ValueError."""
        if self._take("("):
            return _logarithm(self._closed(")"))
        with self._deeper():
            found = self._power()
        if self._is_factor():
            raise ValueError("a product behind ln")
        return _logarithm(found)

    def _argument(self) -> Value:
        r"""A group, or as in \frac12 a single digit."""
        if self._next() == "{":
            return self._group()
        digit = self._next()
        if digit.isascii() and digit.isdigit():
            self.at += 1
            return Fraction(digit)
        return self._atom()

    def _group(self) -> Value:
        self._take("{")
        return self._closed("}")

    def _closed(self, bracket: str) -> Value:
        found = self._sum()
        if not self._take(bracket):
            raise ValueError(f"no {bracket}")
        return found


def _bounded(value: Value) -> Value:
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
        return float(value)
    return value


def _small(value: Value, largest: int) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= largest:
        raise ValueError(f"{value} is no integer of 0 to {largest}")
    return int(value)


def _factorial(value: Value) -> Fraction:
    return Fraction(math.factorial(_small(value, _LARGEST_FACTORIAL)))


def _binomial(n: Value, k: Value) -> Fraction:
    return Fraction(math.comb(_small(n, _LARGEST_BINOMIAL), _small(k, _LARGEST_BINOMIAL)))


def _logarithm(value: Value) -> Value:
    return Fraction(0) if value == 1 else math.log(value)


def _raised(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits <= _MOST_BITS:
            return base ** int(exponent)
    return _real(float(base) ** float(exponent))


def _root(base: Value, degree: Value) -> Value:
    if isinstance(base, Fraction) and degree == 2 and base >= 0:
        top, bottom = math.isqrt(base.numerator), math.isqrt(base.denominator)
        if top * top == base.numerator and bottom * bottom == base.denominator:
            return Fraction(top, bottom)
    if base < 0 and degree == 3:
        return -_root(-base, degree)
    return _real(float(base) ** (1 / float(degree)))


def _real(value: float | complex) -> float:
    if isinstance(value, complex):
        raise ValueError("no real value")
    return value
