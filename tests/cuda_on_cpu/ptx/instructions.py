"""The PTX instructions that are known, each a pattern of its full opcode and the C++ that it means.

A modifier or type that no pattern names is an unknown instruction: the translator stops there.
"""

import re
from collections.abc import Callable

from tests.cuda_on_cpu.ptx.operands import TYPES, Context, bits_of, identifier

Rule = Callable[[Context, re.Match[str], list[str]], str]
RULES: list[tuple[re.Pattern[str], Rule]] = []

_INTEGER = r"([us](?:16|32|64))"
_FLOAT = r"(f32|f64)"
_ANY = r"([busf](?:16|32|64))"


def rule(pattern: str) -> Callable[[Rule], Rule]:
    """Registers the decorated function for the opcodes that `pattern` matches in full."""

    def add(function: Rule) -> Rule:
        RULES.append((re.compile(pattern), function))
        return function

    return add


def _expression(pattern: str, template: str, kinds: Callable[[re.Match[str]], list[str]]) -> None:
    """An instruction `op d, a, b, ...` whose result is `template` with the operands a, b, ... read as `kinds` says.

    In the template T is the C++ type of the first operand, U the unsigned one of its width.
    """

    def translated(c: Context, m: re.Match[str], operands: list[str]) -> str:
        types = kinds(m)
        if len(operands) != len(types) + 1:
            raise ValueError(f"expected {len(types) + 1} operands")
        values = {chr(ord("a") + i): c.read(o, k) for i, (o, k) in enumerate(zip(operands[1:], types, strict=True))}
        cpp = TYPES[types[0]]
        unsigned = f"uint{bits_of(types[0])}_t" if types[0] != "pred" else "bool"
        return c.put(operands[0], template.format(*m.groups(), **values, T=cpp, U=unsigned))

    RULES.append((re.compile(pattern), translated))


def _define_arithmetic() -> None:
    two = lambda m: [m[m.lastindex or 0]] * 2  # noqa: E731
    one = lambda m: [m[m.lastindex or 0]]  # noqa: E731
    _expression(rf"add\.{_INTEGER}", "{U}({U}({a}) + {U}({b}))", two)
    _expression(rf"sub\.{_INTEGER}", "{U}({U}({a}) - {U}({b}))", two)
    _expression(rf"mul\.lo\.{_INTEGER}", "wrap_mul<{U}>({a}, {b})", two)
    _expression(rf"mul\.hi\.{_INTEGER}", "mul_hi<{T}>({a}, {b})", two)
    _expression(r"mul\.wide\.([us]32)", "wrap_mul<uint64_t>(int64_t({a}), int64_t({b}))", two)
    _expression(r"mul\.wide\.([us]16)", "wrap_mul<uint32_t>(int32_t({a}), int32_t({b}))", two)
    _expression(rf"mad\.lo\.{_INTEGER}", "{U}(wrap_mul<{U}>({a}, {b}) + {U}({c}))", lambda m: [m[1]] * 3)
    _expression(
        r"mad\.wide\.([us]32)",
        "wrap_mul<uint64_t>(int64_t({a}), int64_t({b})) + uint64_t({c})",
        lambda m: [m[1], m[1], "u64"],
    )
    _expression(rf"div\.{_INTEGER}", "divide<{T}>({a}, {b})", two)
    _expression(rf"rem\.{_INTEGER}", "remainder<{T}>({a}, {b})", two)
    _expression(rf"neg\.{_INTEGER}", "{U}({U}(0) - {U}({a}))", one)
    _expression(rf"min\.{_INTEGER}", "min_of<{T}>({a}, {b})", two)
    _expression(rf"max\.{_INTEGER}", "max_of<{T}>({a}, {b})", two)
    _expression(r"shl\.(b16|b32|b64)", "shift_left<{T}>({a}, {b})", lambda m: [m[1], "u32"])
    _expression(r"shr\.([bus](?:16|32|64))", "shift_right<{T}>({a}, {b})", lambda m: [m[1], "u32"])
    for name, symbol in (("and", "&"), ("or", "|"), ("xor", "^")):
        _expression(rf"{name}\.(b16|b32|b64|pred)", "{T}({a} " + symbol + " {b})", two)
    _expression(r"not\.(b16|b32|b64)", "{T}(~{a})", one)
    _expression(r"not\.(pred)", "!{a}", one)
    _expression(r"bfi\.(b32|b64)", "bit_field_insert<{T}>({a}, {b}, {c}, {d})", lambda m: [m[1], m[1], "u32", "u32"])
    _expression(r"bfe\.([us](?:32|64))", "bit_field_extract<{T}>({a}, {b}, {c})", lambda m: [m[1], "u32", "u32"])
    _expression(r"prmt\.(b32)", "permute_bytes({a}, {b}, {c})", lambda m: [m[1], m[1], "u32"])
    _expression(r"popc\.(b32)", "uint32_t(__builtin_popcount({a}))", one)
    _expression(r"popc\.(b64)", "uint32_t(__builtin_popcountll({a}))", one)
    _expression(r"selp\.([busf](?:16|32|64))", "({c} ? {a} : {b})", lambda m: [m[1], m[1], "pred"])


def _define_floating_point() -> None:
    two = lambda m: [m[m.lastindex or 0]] * 2  # noqa: E731
    one = lambda m: [m[m.lastindex or 0]]  # noqa: E731
    for name, symbol in (("add", "+"), ("sub", "-"), ("mul", "*")):
        _expression(rf"{name}(?:\.rn)?\.{_FLOAT}", "{a} " + symbol + " {b}", two)
    _expression(rf"div\.rn\.{_FLOAT}", "{a} / {b}", two)
    _expression(rf"rcp\.rn\.{_FLOAT}", "{T}(1) / {a}", one)
    _expression(rf"fma\.rn\.{_FLOAT}", "std::fma({a}, {b}, {c})", lambda m: [m[1]] * 3)
    _expression(rf"fma\.rm\.{_FLOAT}", "fma_rounded<{T}>({a}, {b}, {c}, FE_DOWNWARD)", lambda m: [m[1]] * 3)
    _expression(rf"neg\.{_FLOAT}", "-{a}", one)
    _expression(rf"abs\.{_FLOAT}", "std::abs({a})", one)
    _expression(rf"min\.{_FLOAT}", "min_of<{T}>({a}, {b})", two)
    _expression(rf"max\.{_FLOAT}", "max_of<{T}>({a}, {b})", two)
    _expression(r"rcp\.approx\.ftz\.(f64)", "gross_reciprocal({a})", one)
    _expression(r"ex2\.approx\.ftz\.(f32)", "flush(std::exp2(flush({a})))", one)


def _define_conversions() -> None:
    integers = r"([us](?:8|16|32|64))"
    source = lambda m: [m[2]]  # noqa: E731

    def to_type(pattern: str, template: str) -> None:
        def translated(c: Context, m: re.Match[str], operands: list[str]) -> str:
            value = c.read(operands[1], m[2])
            return c.put(operands[0], template.format(to=TYPES[m[1]], value=value))

        RULES.append((re.compile(pattern), translated))

    to_type(rf"cvt\.{integers}\.{integers}", "{to}({value})")
    to_type(rf"cvt\.rn\.{_FLOAT}\.{_INTEGER}", "{to}({value})")
    to_type(rf"cvt\.rzi\.{_INTEGER}\.{_FLOAT}", "to_integer<{to}>(std::trunc({value}))")
    to_type(rf"cvt\.rni\.{_INTEGER}\.{_FLOAT}", "to_integer<{to}>(std::nearbyint({value}))")
    to_type(r"cvt\.(f64)\.(f32)", "{to}({value})")
    to_type(r"cvt\.rn\.(f32)\.(f64)", "{to}({value})")
    _expression(r"cvt\.sat\.(f32)\.(f32)", "saturate<float>({a})", source)
    _expression(r"cvt\.rn\.bf16x2\.f32", "uint32_t(to_bf16({a})) << 16 | to_bf16({b})", lambda m: ["f32", "f32"])


_define_arithmetic()
_define_floating_point()
_define_conversions()


@rule(r"mov\.(pred|[busf](?:16|32|64))")
def _move(c: Context, m: re.Match[str], operands: list[str]) -> str:
    target, source = operands
    kind = m[1]
    if target.startswith("{"):
        parts = c.vector(target)
        width = bits_of(kind) // len(parts)
        value = c.read(source, f"b{bits_of(kind)}")
        writes = [c.put(p, f"uint{width}_t(whole >> {i * width})") for i, p in enumerate(parts) if p != "_"]
        return f"const uint{bits_of(kind)}_t whole = {value}; " + " ".join(writes)
    if source.startswith("{"):
        parts = c.vector(source)
        width = bits_of(kind) // len(parts)
        whole = f"uint{bits_of(kind)}_t"
        pieces = [f"{whole}({c.read(p, f'b{width}')}) << {i * width}" for i, p in enumerate(parts)]
        return c.put(target, f"{whole}({' | '.join(pieces)})")
    return c.put(target, c.read(source, kind))


@rule(r"cvt\.rn\.satfinite\.e4m3x2\.f32")
def _to_e4m3_pair(c: Context, m: re.Match[str], operands: list[str]) -> str:
    high, low = (c.read(operand, "f32") for operand in operands[1:])
    return c.put(operands[0], f"e4m3_pair({low}, {high})")


@rule(rf"setp\.(eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan)\.{_ANY}")
def _compare(c: Context, m: re.Match[str], operands: list[str]) -> str:
    compare, kind = m[1], m[2]
    target, a, b = operands[0], c.read(operands[1], kind), c.read(operands[2], kind)
    symbols = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    if kind[0] != "f":
        if compare in ("lo", "ls", "hi", "hs"):
            compare = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}[compare]
        return c.put(target, f"{a} {symbols[compare]} {b}")
    unordered = f"unordered({a}, {b})"
    if compare in ("num", "nan"):
        return c.put(target, unordered if compare == "nan" else f"!{unordered}")
    if compare in symbols:
        return c.put(target, f"!{unordered} && {a} {symbols[compare]} {b}")
    return c.put(target, f"{unordered} || {a} {symbols[compare[:2]]} {b}")


@rule(r"cvta(?:\.to)?\.global\.u64")
def _global_address(c: Context, m: re.Match[str], operands: list[str]) -> str:
    return c.put(operands[0], c.read(operands[1], "u64"))


@rule(r"cvta\.param\.u64")
def _parameter_address(c: Context, m: re.Match[str], operands: list[str]) -> str:
    at = f"parameter_at(parameters, {c.read(operands[1], 'u64')})"
    return c.put(operands[0], f"reinterpret_cast<uint64_t>({at})")


@rule(r"cvta\.(to\.)?shared\.u64")
def _shared_address(c: Context, m: re.Match[str], operands: list[str]) -> str:
    value, base = c.read(operands[1], "u64"), "reinterpret_cast<uint64_t>(shared_memory())"
    return c.put(operands[0], f"{value} - {base}" if m[1] else f"{value} + {base}")


@rule(r"ld\.param(?:\.v([24]))?\.([busf](?:8|16|32|64))")
def _load_parameter(c: Context, m: re.Match[str], operands: list[str]) -> str:
    registers = _vector_of(c, operands[0], m[1])
    return " ".join(c.put(r, c.parameter(operands[1], m[2], i)) for i, r in enumerate(registers))


@rule(r"ld(?:\.volatile)?(?:\.(global|shared))?(\.nc)?(?:\.v([24]))?\.([busf](?:8|16|32|64))")
def _load(c: Context, m: re.Match[str], operands: list[str]) -> str:
    space, read_only, kind = m[1] or "", m[2], m[4]
    registers = _vector_of(c, operands[0], m[3])
    access = "read_only_path" if read_only else "read"
    at = c.memory(operands[1], space, len(registers) * bits_of(kind) // 8, access)
    writes = [c.put(r, f"load<{TYPES[kind]}>(at, {i})") for i, r in enumerate(registers)]
    return f"const uint8_t* at = {at}; " + " ".join(writes)


@rule(r"st(?:\.volatile)?(?:\.(global|shared))?(?:\.v([24]))?\.([busf](?:8|16|32|64))")
def _store(c: Context, m: re.Match[str], operands: list[str]) -> str:
    space, kind = m[1] or "", m[3]
    values = _vector_of(c, operands[1], m[2])
    at = c.memory(operands[0], space, len(values) * bits_of(kind) // 8, "write")
    writes = [f"store<{TYPES[kind]}>(at, {i}, {c.read(v, kind)});" for i, v in enumerate(values)]
    return f"uint8_t* at = {at}; " + " ".join(writes)


def _vector_of(c: Context, operand: str, count: str | None) -> list[str]:
    registers = c.vector(operand)
    if len(registers) != int(count or 1):
        raise ValueError(f"{operand} does not have {count or 1} elements")
    return registers


@rule(r"atom(?:\.(global|shared))?\.(add|min|max|and|or|xor)\.([busf](?:32|64))")
def _atomic(c: Context, m: re.Match[str], operands: list[str]) -> str:
    space, what, kind = m[1] or "", m[2], m[3]
    cpp = TYPES[kind] if kind[0] != "s" or what in ("min", "max") else f"uint{bits_of(kind)}_t"
    fold = {"add": "x + y", "min": "min_of(x, y)", "max": "max_of(x, y)", "and": "x & y", "or": "x | y", "xor": "x ^ y"}
    at = c.memory(operands[1], space, bits_of(kind) // 8, "atomic")
    value = f"as<{cpp}>({c.read(operands[2], kind)})"
    return c.put(operands[0], f"atomic<{cpp}>({at}, {value}, []({cpp} x, {cpp} y) {{ return {cpp}({fold[what]}); }})")


@rule(r"bar\.sync")
def _block_barrier(c: Context, m: re.Match[str], operands: list[str]) -> str:
    barrier, count = [*operands, "0"] if len(operands) == 1 else operands
    return f"block_barrier({c.read(barrier, 's32')}, {c.read(count, 's32')});"


@rule(r"bar\.warp\.sync")
def _warp_barrier(c: Context, m: re.Match[str], operands: list[str]) -> str:
    return f"warp_barrier({c.read(operands[0], 'u32')});"


@rule(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
def _shuffle(c: Context, m: re.Match[str], operands: list[str]) -> str:
    target, _, predicate = operands[0].partition("|")
    value, b, clamp, mask = (c.read(operand, "u32") for operand in operands[1:])
    call = f"bool in_range; const uint32_t got = shfl(Shuffle::{m[1]}, {value}, {b}, {clamp}, {mask}, in_range); "
    return call + c.put(target, "got") + (" " + c.put(predicate, "in_range") if predicate else "")


@rule(r"match\.any\.sync\.b32")
def _match_any(c: Context, m: re.Match[str], operands: list[str]) -> str:
    return c.put(operands[0], f"match_any({c.read(operands[1], 'u32')}, {c.read(operands[2], 'u32')})")


@rule(r"redux\.sync\.(min|max)\.([us]32)")
def _redux(c: Context, m: re.Match[str], operands: list[str]) -> str:
    cpp = TYPES[m[2]]
    fold = f"[]({cpp} x, {cpp} y) {{ return {m[1]}_of(x, y); }}"
    call = f'redux<{cpp}>("redux.sync.{m[1]}", {c.read(operands[1], m[2])}, {c.read(operands[2], "u32")}, {fold})'
    return c.put(operands[0], call)


@rule(r"vote\.sync\.ballot\.b32")
def _ballot(c: Context, m: re.Match[str], operands: list[str]) -> str:
    return c.put(operands[0], f"ballot({c.read(operands[1], 'pred')}, {c.read(operands[2], 'u32')})")


@rule(r"bra(?:\.uni)?")
def _branch(c: Context, m: re.Match[str], operands: list[str]) -> str:
    (target,) = operands
    return f"goto {identifier(target)};"


@rule(r"ret|exit")
def _return(c: Context, m: re.Match[str], operands: list[str]) -> str:
    return "return;"


@rule(r"trap")
def _trap(c: Context, m: re.Match[str], operands: list[str]) -> str:
    return f'fail("trap at PTX line {c.line}");'
