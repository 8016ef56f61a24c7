"""Reads the PTX that nvcc writes: entries, their parameters, registers and statements, each with its line."""

import math
import re
from dataclasses import dataclass, field, replace


class PtxError(Exception):
    """PTX that the translator does not know, with its line. It never guesses."""


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands`; the guard may be negated, and is "" where there is none."""

    line: int
    guard: str
    opcode: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Registers:
    """`.reg .type names`: the width is all that matters, in bits; 1 is a predicate."""

    width: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Scope:
    """`{` or `}`."""

    opens: bool


Statement = Instruction | Label | Registers | Scope


@dataclass(frozen=True)
class Entry:
    """One kernel."""

    symbol: str
    parameters: tuple[str, ...]
    statements: tuple[Statement, ...]
    max_threads: int = 0  # of a block, as the kernel says; 0 if it does not


@dataclass(frozen=True)
class Module:
    entries: tuple[Entry, ...]
    dynamic_shared: frozenset[str] = field(default_factory=frozenset)


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", re.S)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)(?:\[\d+\])?")
_HINTS = re.compile(r'\.pragma "(nounroll|used_bytes_mask \w+)"')  # they mean nothing to the result
_KNOWN_DIRECTIVES = re.compile(r"\s*(\.(maxntid|reqntid|minnctapersm|maxnreg)[ \d,]*\s*)*")


def parse(text: str) -> Module:
    """Raises PtxError for what is not understood outside instructions; the translator checks those."""
    text = re.sub(r"//[^\n]*", "", text)
    for unknown in re.finditer(r"^\s*(?:\.visible\s+|\.extern\s+|\.weak\s+)*\.(func|const|global)\b[^\n]*", text, re.M):
        raise PtxError(f"line {_line(text, unknown.start())}: unsupported declaration {unknown[0].strip()!r}")
    dynamic = set()
    for shared in re.finditer(r"^\s*(\.extern\s+)?\.shared[^\n]*?([\w$]+)\[(\d*)\];", text, re.M):
        if not shared[1] or shared[3]:
            where = _line(text, shared.start())
            raise PtxError(f"line {where}: static shared memory {shared[2]!r}; kernels use the dynamic block only")
        dynamic.add(shared[2])
    entries = [_entry(text, match) for match in _ENTRY.finditer(text)]
    return Module(tuple(entries), frozenset(dynamic))


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _entry(text: str, match: re.Match[str]) -> Entry:
    if not _KNOWN_DIRECTIVES.fullmatch(match[3]):
        raise PtxError(f"line {_line(text, match.end())}: unsupported directive in {match[3].strip()!r}")
    parameters = tuple(_PARAMETER.findall(match[2]))
    statements = tuple(_with_unique_labels(_statements(text, match.end())))
    sizes = re.search(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", match[3])
    return Entry(match[1], parameters, statements, math.prod(map(int, sizes[1].split(","))) if sizes else 0)


def _with_unique_labels(statements: list[Statement]) -> list[Statement]:
    """A label of an inner scope gets the scope's number: PTX may use its name in another scope again, C++ may not."""
    scopes: list[tuple[int, ...]] = []  # of each statement, innermost last
    path, count = (0,), 0
    for statement in statements:
        if isinstance(statement, Scope):
            count += statement.opens
            path = (*path, count) if statement.opens else path[:-1]
        scopes.append(path)
    declared = {(p[-1], s.name) for s, p in zip(statements, scopes, strict=True) if isinstance(s, Label)}

    def unique(name: str, path: tuple[int, ...]) -> str:
        scope = next((scope for scope in reversed(path) if (scope, name) in declared), 0)
        return f"{name}$scope{scope}" if scope else name

    renamed: list[Statement] = []
    for statement, scope in zip(statements, scopes, strict=True):
        if isinstance(statement, Label):
            statement = Label(unique(statement.name, scope))
        elif isinstance(statement, Instruction) and statement.opcode in ("bra", "bra.uni"):
            targets = tuple(unique(target, scope) for target in statement.operands)
            statement = replace(statement, operands=targets)
        renamed.append(statement)
    return renamed


def _statements(text: str, position: int) -> list[Statement]:
    """From behind the entry's `{` to its `}`."""
    statements: list[Statement] = []
    depth, start = 1, position
    line, counted = _line(text, position), position
    while True:
        char = text[position]
        pending = text[start:position].strip()
        position += 1
        if char in "{}" and not pending:
            depth += 1 if char == "{" else -1
            if depth == 0:
                return statements
            statements.append(Scope(char == "{"))
        elif char == ":" and re.fullmatch(r"[\w$]+", pending):
            statements.append(Label(pending))
        elif char == ";" and _HINTS.fullmatch(pending):
            pass
        elif char == ";":
            line += text.count("\n", counted, position)
            counted = position
            statements.append(_statement(pending, line))
        else:
            continue
        start = position


def _statement(text: str, line: int) -> Statement:
    if text.startswith(".reg"):
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
        if not match:
            raise PtxError(f"line {line}: unsupported declaration {text!r}")
        return Registers(_width(match[1], line), tuple(_register_names(match[2])))
    if text.startswith("."):
        raise PtxError(f"line {line}: unsupported directive {text!r}")
    match = re.fullmatch(r"(?:@(!?%?[\w$]+)\s+)?(\S+)\s*(.*)", text, re.S)
    assert match
    return Instruction(line, match[1] or "", match[2], tuple(split_operands(match[3])))


def _width(kind: str, line: int) -> int:
    if kind == "pred":
        return 1
    match = re.fullmatch(r"[busf](8|16|32|64)", kind)
    if not match:
        raise PtxError(f"line {line}: unsupported register type .{kind}")
    return int(match[1])


def _register_names(text: str) -> list[str]:
    names: list[str] = []
    for part in text.split(","):
        ranged = re.fullmatch(r"(%[\w$]+)<(\d+)>", part.strip())
        names += [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [part.strip()]
    return names


def split_operands(text: str) -> list[str]:
    """At the commas outside brackets."""
    operands, depth, current = [], 0, ""
    for char in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(char, 0)
        if char == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += char
    return [*operands, current.strip()] if current.strip() else operands
