"""What ptxas makes of the kernels for sm_90a: registers, spills, occupancy and counts of machine instructions."""

import importlib.metadata
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.ptx.parse import parse

HOW_TO_DISASSEMBLE = (
    "nvdisasm is neither in PATH nor installed with pip: there are no counts of machine instructions; "
    "pip install nvidia-cuda-nvdisasm (5 MB)"
)
# One multiprocessor of sm_90.
REGISTERS, SHARED_BYTES, THREADS, BLOCKS, WARP = 65536, 228 << 10, 2048, 32, 32
_PARTITIONS, _REGISTERS_PER_WARP, _SHARED_STEP, _SHARED_OF_SYSTEM = 4, 256, 128, 1024
OCCUPANCY_RULE = (
    "occupancy: resident warps of 64. Blocks on a multiprocessor are at most 32, 2048 threads, what fits in 228 KB of "
    "shared memory (a block's rounded up to 128 bytes, and 1 KB for the system), and in 65536 registers (a warp's "
    "rounded up to 256, a quarter of them for a quarter of the warps)"
)
# Columns of a report, each a pattern of a full opcode.
INSTRUCTIONS = {
    "HGMMA": r"HGMMA\b.*",
    "QGMMA": r"QGMMA\b.*",
    "HMMA": r"(?:HMMA|IMMA|QMMA)\b.*",
    "UTMALDG": r"UTMALDG\b.*",
    "UTMASTG": r"UTMASTG\b.*",
    "LDG128": r"LDG\b.*\.128\b.*",
    "STG128": r"STG\b.*\.128\b.*",
    "LDL": r"LDL\b.*",
    "STL": r"STL\b.*",
    "SYNCS": r"SYNCS\b.*",
    "USETMAXREG": r"USETMAXREG\b.*",
}
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one kernel takes. Bytes are of a thread (stack, spills) or a block (shared)."""

    symbol: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_shared_bytes: int
    max_threads: int


def resources_from(usage: str, max_threads: dict[str, int]) -> dict[str, Resources]:
    """By symbol, from what `ptxas -v` prints. Raises ValueError where a kernel's figures are missing."""
    found = {}
    for part in usage.split("Compiling entry function ")[1:]:
        symbol = part.split("'")[1]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        if not frame or not used:
            raise ValueError(f"ptxas -v does not say what {symbol} uses: {part}")
        shared = re.search(r"(\d+) bytes smem", part)
        found[symbol] = Resources(
            symbol=symbol,
            registers=int(used[1]),
            stack_bytes=int(frame[1]),
            spill_store_bytes=int(frame[2]),
            spill_load_bytes=int(frame[3]),
            static_shared_bytes=int(shared[1]) if shared else 0,
            max_threads=max_threads.get(symbol, 0),
        )
    return found


def resources_of(op: str) -> dict[str, Resources]:
    """Of every kernel of one op of csrc, by symbol."""
    entries = parse(build.ptx_of(build.CSRC, op).read_text()).entries
    usage = usage_of(op)
    found = resources_from(usage, {entry.symbol: entry.max_threads for entry in entries})
    if missing := {entry.symbol for entry in entries} - found.keys():
        raise ValueError(f"ptxas -v says nothing of {sorted(missing)}")
    return found


def usage_of(op: str) -> str:
    """What ptxas said of one op, warnings included."""
    return (build.compiled_op(op) / "usage.txt").read_text()


def find_nvdisasm() -> str | None:
    """The one of pip's nvidia-cuda-nvdisasm, else that of a CUDA toolkit in PATH."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvdisasm" and Path(str(file.locate())).is_file():
            return str(file.locate())
    return shutil.which("nvdisasm")


def instructions_in(cubin: Path) -> dict[str, Counter[str]]:
    """For each kernel of a cubin, by symbol, how often it has each opcode. Needs nvdisasm."""
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise FileNotFoundError(HOW_TO_DISASSEMBLE)
    result = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True, timeout=300)
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in result.stdout.splitlines():
        if start := re.fullmatch(r"\.text\.([\w$]+):", line):
            current = counts.setdefault(start[1], Counter())
        elif found := _INSTRUCTION.match(line):
            current[found[1]] += 1
    return counts


def instructions_of(op: str) -> dict[str, Counter[str]]:
    """The same of one op of csrc."""
    return instructions_in(build.compiled_op(op) / "kernels.cubin")


def summarize(opcodes: Counter[str]) -> dict[str, int]:
    """The columns of INSTRUCTIONS, and the total."""
    columns = {
        name: sum(count for opcode, count in opcodes.items() if re.fullmatch(pattern, opcode))
        for name, pattern in INSTRUCTIONS.items()
    }
    return {"total": sum(opcodes.values()), **columns}


@dataclass(frozen=True)
class Occupancy:
    """Blocks on one multiprocessor at a time, and what keeps more of them out."""

    blocks: int
    warps: int
    bound_by: str

    @property
    def share(self) -> float:
        """Of the 64 warps."""
        return self.warps * WARP / THREADS


def occupancy(registers: int, threads: int, shared_bytes: int) -> Occupancy:
    """Of a kernel with so many registers a thread, threads a block and bytes of shared memory (static and dynamic)."""

    def up(value: int, step: int) -> int:
        return -(-value // step) * step

    warps = -(-threads // WARP)
    per_warp = up(max(registers, 1) * WARP, _REGISTERS_PER_WARP)
    resident = REGISTERS // _PARTITIONS // per_warp * _PARTITIONS
    limits = {
        "threads": THREADS // WARP // warps,
        "registers": resident // warps,
        "shared memory": SHARED_BYTES // (up(shared_bytes, _SHARED_STEP) + _SHARED_OF_SYSTEM),
        "blocks": BLOCKS,
    }
    bound_by = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[bound_by], limits[bound_by] * warps, bound_by)


def readable(symbols: list[str]) -> dict[str, str]:
    """Names such as `combine_kernel<Bf16, true>`."""
    demangler = shutil.which("c++filt")
    if demangler is None:
        return {symbol: symbol for symbol in symbols}
    result = subprocess.run(
        [demangler], input="\n".join(symbols), capture_output=True, text=True, check=True, timeout=60
    )
    names = {}
    for symbol, full in zip(symbols, result.stdout.splitlines(), strict=True):
        name = re.sub(
            r"\(k25::cuda::GemmKind\)(\d)", lambda m: ("rows", "transposed_b", "weight_grads")[int(m[1])], full
        )
        name = re.sub(r"^void |k25::(?:cuda::)?", "", name).split("(")[0]
        names[symbol] = re.sub(r"GemmConfig<(.*?)\s*>\s*>$", r"\1>", name).replace("Operands", "")
    return names
