"""How an operand of a PTX instruction is read and written in C++."""

import re

TYPES = {
    "pred": "bool",
    "b8": "uint8_t", "u8": "uint8_t", "s8": "int8_t",
    "b16": "uint16_t", "u16": "uint16_t", "s16": "int16_t",
    "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t",
    "b64": "uint64_t", "u64": "uint64_t", "s64": "int64_t",
    "f32": "float", "f64": "double",
}  # fmt: skip

_SPECIAL = {
    **{f"%tid.{axis}": f"current_thread().thread.{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"current_thread().block_dim.{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"current_thread().block.{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"current_thread().grid_dim.{axis}" for axis in "xyz"},
    "%laneid": "uint32_t(lane())",
    "%lanemask_lt": "((1u << lane()) - 1u)",
}


def identifier(name: str) -> str:
    """A register or label as a C++ name."""
    return name.replace("%", "r_").replace("$", "L_").replace(".", "_")


def bits_of(kind: str) -> int:
    """Width of a PTX type such as u32."""
    return int(kind[1:])


class Context:
    """Names that an entry's operands may use, and the line of the current instruction."""

    def __init__(self, dynamic_shared: frozenset[str], parameters: tuple[str, ...]) -> None:
        self.dynamic_shared = dynamic_shared
        self.parameters = parameters
        self.registers: set[str] = set()  # all that the entry declares
        self.line = 0

    def read(self, operand: str, kind: str) -> str:
        """The operand as a value of PTX type `kind`. Raises ValueError for a form that is not known."""
        cpp = TYPES[kind]
        if operand in _SPECIAL:
            return f"{cpp}({_SPECIAL[operand]})"
        if operand.startswith("!") and kind == "pred":
            return f"!{self.read(operand[1:], kind)}"
        if operand in self.registers:
            return f"as<{cpp}>({identifier(operand)})"
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            return f"as<{cpp}>(uint32_t(0x{match[1]}u))"
        if match := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", operand):
            return f"as<{cpp}>(uint64_t(0x{match[1]}ull))"
        if kind[0] != "f" and re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", operand):
            value = int(operand, 0) % 2**64
            return f"{cpp}({value}ull)" if kind != "pred" else ("true" if value else "false")
        if operand in self.parameters and kind in ("b32", "u32", "b64", "u64"):
            return f"{cpp}(parameter_address({self.parameters.index(operand)}))"
        if operand in self.dynamic_shared and kind in ("b32", "u32", "b64", "u64"):
            return f"{cpp}(0)"  # the block's dynamic shared memory starts at offset 0
        raise ValueError(f"operand {operand!r} as .{kind}")

    def put(self, operand: str, expression: str) -> str:
        """The statement that writes a register; `_` discards."""
        if operand == "_":
            return f"static_cast<void>({expression});"
        if operand not in self.registers:
            raise ValueError(f"destination {operand!r}")
        return f"put({identifier(operand)}, {expression});"

    def vector(self, operand: str) -> list[str]:
        """The registers of `{a, b}`, or the one."""
        return [part.strip() for part in operand.strip("{}").split(",")] if operand.startswith("{") else [operand]

    def split_address(self, operand: str) -> tuple[str, int]:
        """Base and byte offset of `[base+offset]`."""
        match = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not match:
            raise ValueError(f"address {operand!r}")
        return match[1], int(match[2] or 0)

    def name(self, register: str) -> str:
        """The C++ variable of a register."""
        return identifier(register)

    def shared_offset(self, operand: str) -> str:
        """The offset in shared memory that `[base+offset]` means."""
        base, offset = self.split_address(operand)
        if base in self.dynamic_shared:
            return f"uint64_t({offset})"
        return f"uint64_t(uint32_t({self.read(base, 'b32')}) + uint32_t({offset}))"

    def memory(self, operand: str, space: str, num_bytes: int, access: str) -> str:
        """The checked host address of an access; `space` is global, shared or "" (generic)."""
        base, offset = self.split_address(operand)
        function = {"global": "global_memory", "shared": "shared_memory_at", "": "generic_memory"}[space]
        if space == "shared":
            address = f"uint64_t(uint32_t({identifier(base)}) + uint32_t({offset}))"
            address = f"uint64_t({offset})" if base in self.dynamic_shared else address
        else:
            address = f"{self.read(base, 'u64')} + uint64_t(int64_t({offset}))"
        return f"{function}({address}, {num_bytes}, Access::{access}, {self.line})"

    def parameter(self, operand: str, kind: str, index: int = 0) -> str:
        """The `index`-th value of type `kind` at `[name+offset]` of the kernel's parameters."""
        base, offset = self.split_address(operand)
        at = offset + index * bits_of(kind) // 8
        if base in self.registers:  # the parameter's address was moved there
            return f"load<{TYPES[kind]}>(parameter_at(parameters, {self.read(base, 'u64')} + {at}), 0)"
        if base not in self.parameters:
            raise ValueError(f"parameter {base!r}")
        return f"parameter<{TYPES[kind]}>(parameters, {self.parameters.index(base)}, {at})"
