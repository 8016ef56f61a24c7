"""PTX to C++: one function for each entry, registered under its symbol. Instructions are in `instructions.py`."""

import re

from tests.cuda_on_cpu.ptx import hopper as hopper  # adds its rules
from tests.cuda_on_cpu.ptx.instructions import RULES, Rule
from tests.cuda_on_cpu.ptx.operands import Context, identifier
from tests.cuda_on_cpu.ptx.parse import Entry, Instruction, Label, Module, PtxError, Registers, parse

_REGISTER_TYPES = {1: "bool", 8: "uint8_t", 16: "uint16_t", 32: "uint32_t", 64: "uint64_t"}


def translate(text: str, without: str = "") -> str:
    """The C++ file for a PTX file, without the entries in whose symbol the pattern `without`, if any, is found.

    Raises PtxError, with the line, for anything unknown.
    """
    module = parse(text)
    entries = [entry for entry in module.entries if not (without and re.search(without, entry.symbol))]
    functions = [_function(module, entry, f"kernel_{i}") for i, entry in enumerate(entries)]
    table = [f'const Registration registration_{i}("{e.symbol}", &kernel_{i});' for i, e in enumerate(entries)]
    head = '#include "ptx_semantics.h"\n\nnamespace {\nusing namespace cuda_on_cpu;\n\n'
    return head + "\n\n".join([*functions, "\n".join(table)]) + "\n}  // namespace\n"


def _function(module: Module, entry: Entry, name: str) -> str:
    context = Context(module.dynamic_shared, entry.parameters)
    lines = [f"void {name}(void* const* parameters) {{"]
    depth = 0
    for statement in entry.statements:
        if isinstance(statement, Registers):
            context.registers.update(statement.names)
            # Inside a scope without an initial value: C++ lets a goto pass such a declaration.
            start = "" if depth else " = ~0" if statement.width > 1 else " = false"
            for register in statement.names:
                value = start.replace("~0", f"{_REGISTER_TYPES[statement.width]}(~0ull)")
                lines.append(f"{_REGISTER_TYPES[statement.width]} {identifier(register)}{value};")
        elif isinstance(statement, Label):
            lines.append(f"{identifier(statement.name)}:;")
        elif isinstance(statement, Instruction):
            lines.append(_instruction(context, statement))
        else:
            depth += 1 if statement.opens else -1
            lines.append("{" if statement.opens else "}")
    return "\n".join([*lines, "}"])


def _instruction(context: Context, instruction: Instruction) -> str:
    found = _find(instruction)
    context.line = instruction.line
    try:
        code = found[0](context, found[1], list(instruction.operands))
    except (ValueError, IndexError, KeyError) as error:
        what = f"{instruction.opcode} {', '.join(instruction.operands)}"
        raise PtxError(f"line {instruction.line}: operands not understood: {what} ({error})") from error
    if not instruction.guard:
        return f"{{ {code} }}" if not code.startswith("goto") else code
    negated = "!" if instruction.guard.startswith("!") else ""
    return f"if ({negated}{identifier(instruction.guard.lstrip('!'))}) {{ {code} }}"


def _find(instruction: Instruction) -> tuple[Rule, re.Match[str]]:
    for pattern, rule in RULES:
        match = pattern.fullmatch(instruction.opcode)
        if match:
            return rule, match
    raise PtxError(f"line {instruction.line}: unknown instruction {instruction.opcode}")
