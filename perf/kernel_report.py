"""What is known of the CUDA kernels without a GPU: resources, machine code, work counted by the executor, rooflines.

python perf/kernel_report.py [--op OP] [--json FILE]

Needs nvcc and g++. Counts of machine instructions need nvdisasm (`pip install -e '.[kernel-report]'`). The executor and
its cases are tests/cuda_on_cpu: the report uses the modules `build`, `machine_code` and `kernel_cases` of that package,
which are made for it. No time here is measured: they are calculated from an H800's peaks, and those of others, printed
beside them as targets, were published.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from perf import harness
from tests.cuda_on_cpu import build, machine_code
from tests.cuda_on_cpu.kernel_cases import (
    PRODUCTS_AT_SCALE,
    ROW_CASES,
    SMALL_PRODUCTS,
    Counts,
    RowCase,
    Work,
    count_product,
    count_row_case,
    moved,
)

BYTES_PER_SECOND = 3.35e12  # H800 SXM
FLOP_PER_SECOND = {16: 989e12, 8: 1979e12}  # by the bits of an operand, dense
DEEPGEMM = "DeepGEMM, H800, README of early 2025, grouped contiguous"
DEEPEP = "DeepEP V1, H800, EP8 over NVLink, docs/legacy.md: between GPUs, ours within one"
# FP8 by groups, rows of a group, columns and depth: FLOP a second.
PUBLISHED_PRODUCTS = {
    (4, 8192, 4096, 7168): 1297e12,
    (4, 8192, 7168, 2048): 1099e12,
    (8, 4096, 4096, 7168): 1288e12,
    (8, 4096, 7168, 2048): 1093e12,
}
PUBLISHED_TRANSPORT = {"dispatch_kernel": 153e9, "combine_kernel": 158e9}  # bytes a second
RESOURCES = """Resources (bytes; spills are stores/loads; dynamic shared memory and blocks on a multiprocessor are those
of the case below, - where none launches the instance) and machine instructions of sm_90a"""
COUNTED = """
Counted by the executor: bytes of global memory, by threads and by bulk copies, as often as they are asked for (each
lane of a broadcast, each tile that loads an operand again: caches are not modelled), FLOP of the tensor cores, and the
ratio of each to what the algorithm must move and compute"""
CALCULATED = f"""
Roofline on an H800 (3.35 TB/s, 989 TFLOPS bf16, 1979 TFLOPS FP8): calculated, not measured. Products are groups x rows
of each x columns x depth (weight gradients: depth by columns, summed over rows). Targets are what others published:
{DEEPGEMM};
{DEEPEP}"""
DTYPES = {
    torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64", torch.int32: "int32", torch.int64: "int64",
    torch.float8_e4m3fn: "e4m3",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One instance of a kernel; what comes from a launch is None where no case launches it."""

    name: str
    op: str
    resources: machine_code.Resources
    dynamic_shared_bytes: int | None
    occupancy: machine_code.Occupancy | None
    instructions: dict[str, int] | None

    def as_json(self) -> dict[str, Any]:
        """A case of the JSON."""
        shape = self.occupancy
        return {
            "name": f"resources/{self.name}",
            "op": self.op,
            **asdict(self.resources),
            "dynamic_shared_bytes": self.dynamic_shared_bytes,
            "blocks_per_multiprocessor": shape and shape.blocks,
            "occupancy": shape and shape.share,
            "occupancy_bound_by": shape and shape.bound_by,
            "instructions": self.instructions,
        }


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What one launch moved and computed beside what the algorithm has to."""

    name: str
    case: str
    counts: Mapping[str, int]
    expected: Work

    @property
    def work(self) -> Work:
        """As counted."""
        return moved(self.counts)

    def as_json(self) -> dict[str, Any]:
        """A case of the JSON."""
        expected = {f"algorithm_{key}": value for key, value in asdict(self.expected).items()}
        return {"name": f"counted/{self.name}", "case": self.case, **self.counts, **expected}


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least time of K2.5's case on an H800, and a published rate in FLOP or bytes a second as a target."""

    name: str
    case: str
    work: Work
    operand_bits: int = 16
    published: float | None = None
    source: str = ""

    @property
    def seconds(self) -> float:
        """Calculated."""
        return max(self.work.moved / BYTES_PER_SECOND, self.work.flop / FLOP_PER_SECOND[self.operand_bits])

    @property
    def bound_by(self) -> str:
        """Memory or tensor cores."""
        return "memory" if self.seconds == self.work.moved / BYTES_PER_SECOND else "tensor cores"

    @property
    def target_seconds(self) -> float | None:
        """At the published rate of FLOP; a rate of bytes is a transport's, which moves other bytes."""
        return self.work.flop / self.published if self.published and self.work.flop else None

    def as_json(self) -> dict[str, Any]:
        """A case of the JSON."""
        return {
            "name": f"roofline/{self.name}",
            "case": self.case,
            "label": "calculated",
            "bytes": self.work.moved,
            "flops": self.work.flop,
            "calculated_s": self.seconds,
            "bound_by": self.bound_by,
            "target_s": self.target_seconds,
            "target_per_second": self.published,
            "target_source": self.source,
        }


def count_rows(module: ModuleType, op: str) -> tuple[Counts, list[Counted]]:
    """Launches of every instance that the op's cases reach, and the counted case of each kernel."""
    launched: Counts = {}
    counted = []
    runs: dict[tuple[Any, ...], Counts] = {}
    for kernel, case in ROW_CASES.items():
        if case.op != op:
            continue
        for dtype in case.dtypes:
            for shift in (0, 1):  # the second without 16-byte accesses
                key = (case.run, dtype, shift)
                if key not in runs:
                    runs[key] = count_row_case(module, case, dtype, shift)
                launched.update(runs[key])
        counted.append(counted_rows(kernel, case, runs[case.run, case.dtypes[0], 0]))
    return launched, counted


def counted_rows(kernel: str, case: RowCase, counts: Counts) -> Counted:
    """The case in its first type, tensors aligned."""
    (symbol,) = [symbol for symbol in counts if f"{len(kernel)}{kernel}" in symbol]
    dtype = case.dtypes[0]
    return Counted(
        name=kernel,
        case=f"{case.rows} {case.unit}, {DTYPES[dtype]}",
        counts=counts[symbol],
        expected=case.work(case.rows, dtype.itemsize),
    )


def count_products(module: ModuleType) -> tuple[Counts, list[Counted]]:
    """The first small product that each instance of the matrix products is chosen for."""
    launched: Counts = {}
    counted = []
    for product in SMALL_PRODUCTS:
        for symbol, counts in count_product(module, product).items():
            if symbol not in launched:
                launched[symbol] = counts
                counted.append(Counted(name=symbol, case=product.name, counts=counts, expected=product.work))
    names = machine_code.readable(list(launched))
    return launched, [replace(each, name=names[each.name]) for each in counted]


def instances(op: str, launched: Counts, opcodes: Mapping[str, Counter[str]] | None) -> list[Instance]:
    """Every instance in the op's machine code, by name."""
    resources = machine_code.resources_of(op)
    names = machine_code.readable(list(resources))
    found = []
    for symbol, one in resources.items():
        dynamic = launched[symbol]["shared_bytes"] if symbol in launched else None
        threads = launched[symbol]["num_threads"] if symbol in launched else one.max_threads
        shape = None
        if dynamic is not None:
            shape = machine_code.occupancy(one.registers, threads, one.static_shared_bytes + dynamic)
        found.append(
            Instance(
                name=names[symbol], op=op, resources=one, dynamic_shared_bytes=dynamic, occupancy=shape,
                instructions=machine_code.summarize(opcodes[symbol]) if opcodes else None,
            )
        )  # fmt: skip
    return sorted(found, key=lambda each: each.name)


def rooflines(op: str) -> list[Roofline]:
    """Of K2.5's shapes."""
    if op == "gemm":
        return [
            Roofline(
                name=product.name, case="K2.5's experts", work=product.work, operand_bits=product.bits,
                published=PUBLISHED_PRODUCTS.get(key) if product.bits == 8 and product.kind == "rows" else None,
                source=DEEPGEMM if product.bits == 8 and product.kind == "rows" else "",
            )
            for product in PRODUCTS_AT_SCALE
            for key in [(product.groups, product.rows, product.columns, product.depth)]
        ]  # fmt: skip
    return [
        Roofline(
            name=kernel,
            case=f"{case.rows_at_scale} {case.unit}, {DTYPES[case.dtypes[0]]}",
            work=case.work(case.rows_at_scale, case.dtypes[0].itemsize),
            published=PUBLISHED_TRANSPORT.get(kernel),
            source=DEEPEP if kernel in PUBLISHED_TRANSPORT else "",
        )
        for kernel, case in ROW_CASES.items()
        if case.op == op
    ]


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as they need; the first two flush left."""
    cells = [[*map(str, headings)], *([("-" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    line = lambda row: "  ".join(  # noqa: E731
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "\n".join(line(row).rstrip() for row in cells)


def describe_instances(found: Sequence[Instance]) -> str:
    """The table of resources and machine code."""
    columns = ["total", *machine_code.INSTRUCTIONS]
    rows = []
    for each in found:
        r, shape = each.resources, each.occupancy
        spills = f"{r.spill_store_bytes}/{r.spill_load_bytes}"
        rows.append(
            [
                each.name, each.op, r.registers, spills, r.stack_bytes, r.static_shared_bytes,
                each.dynamic_shared_bytes, r.max_threads or None,
                shape and shape.blocks, shape and f"{shape.share:.0%}", shape and shape.bound_by,
                *(each.instructions[name] if each.instructions else None for name in columns),
            ]
        )  # fmt: skip
    headings = ["kernel", "op", "regs", "spills", "stack", "static", "dynamic", "threads", "blocks", "occ.", "bound by"]
    return table([*headings, *columns], rows)


def describe_counts(found: Sequence[Counted]) -> str:
    """The table of what was counted, each beside the algorithm's; ratios where that is not 0."""

    def ratio(counted: int, expected: int) -> str | None:
        return f"{counted / expected:.2f}" if expected else None

    rows = []
    for each in found:
        c, work, expected = each.counts, each.work, each.expected
        rows.append(
            [
                each.name, each.case, c["loaded_bytes"], c["bulk_loaded_bytes"], ratio(work.read, expected.read),
                c["stored_bytes"], c["bulk_stored_bytes"], ratio(work.written, expected.written), work.flop,
                ratio(work.flop, expected.flop),
            ]
        )  # fmt: skip
    headings = ["kernel", "case", "loads", "bulk loads", "/ algorithm", "stores", "bulk stores", "/ algorithm"]
    return table([*headings, "FLOP", "/ algorithm"], rows)


def microseconds(seconds: float) -> str:
    """Three digits, without an exponent."""
    value = seconds * 1e6
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def describe_rooflines(found: Sequence[Roofline]) -> str:
    """The table of calculated times and targets."""
    rows = []
    for each in found:
        target = each.target_seconds
        rate = each.published and (f"{each.published / (1e12 if each.work.flop else 1e9):.0f}")
        unit = "TFLOPS" if each.work.flop else "GB/s"
        rows.append(
            [
                each.name, each.case, f"{each.work.moved / 1e6:.1f}", f"{each.work.flop / 1e12:.2f}",
                microseconds(each.seconds), each.bound_by,
                target and microseconds(target), rate and f"{rate} {unit}",
            ]
        )  # fmt: skip
    return table(["kernel", "case", "MB", "TFLOP", "calculated us", "bound by", "target us", "at"], rows)


@dataclass(frozen=True)
class Report:
    """All that is known of some ops."""

    instances: list[Instance]
    counted: list[Counted]
    rooflines: list[Roofline]

    def as_text(self) -> str:
        """Three tables, each with what its columns mean."""
        missing = "" if machine_code.find_nvdisasm() else f"{machine_code.HOW_TO_DISASSEMBLE}\n"
        resources = f"{missing}{describe_instances(self.instances)}\n{machine_code.OCCUPANCY_RULE}"
        counted, calculated = describe_counts(self.counted), describe_rooflines(self.rooflines)
        return "\n".join([RESOURCES, resources, COUNTED, counted, CALCULATED, calculated])


def report_on(ops: Sequence[str]) -> Report:
    """Builds and runs what they need."""
    disassemble = machine_code.find_nvdisasm() is not None
    report = Report([], [], [])
    for op in ops:
        if op == "gemm":
            launched, counted = count_products(build.gemm_module())
        else:
            launched, counted = count_rows(build.executor_module(), op)
        opcodes = machine_code.instructions_of(op) if disassemble else None
        report.instances.extend(instances(op, launched, opcodes))
        report.counted.extend(counted)
        report.rooflines.extend(rooflines(op))
    return report


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=[*build.OPS, "gemm"], help="only this folder of csrc")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    return parser.parse_args()


def main() -> None:
    """Prints the tables and writes the JSON."""
    arguments = parse_arguments()
    if build.find_nvcc() is None:
        raise SystemExit("nvcc is not in K25_CUDA_HOME/bin, CUDA_HOME/bin or PATH: there is no kernel to report on")
    report = report_on([arguments.op] if arguments.op else [*build.OPS, "gemm"])
    print(report.as_text())
    if arguments.json:
        cases = [each.as_json() for each in (*report.instances, *report.counted, *report.rooflines)]
        harness.write_json(arguments.json, "kernel_report", {"executor": "ptx"}, cases)


if __name__ == "__main__":
    main()
