"""Timing for the benches, on torch.utils.benchmark: candidates alternated in one process, medians, peak memory."""

import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Measurement, TaskSpec
from torch.utils.benchmark.utils.timer import timer as clock

from k25sys import build_info

TUNED_ALLOCATOR = (
    "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1"
)


def alternate(
    candidates: dict[str, Callable[[], Any]], *, seconds: float, least: int = 5, most: int = 25
) -> dict[str, Measurement]:
    """Runs the candidates in turn, round after round, until `seconds` are spent (at least `least` rounds).

    The order of a round turns around each time, so that no candidate always follows the same one. Each is run twice
    before, in both orders: until then the allocator still asks the system for pages that later runs have. A candidate
    that takes most of `seconds` and many times as long as the fastest runs once, and that run counts.
    """
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in candidates}

    def once(name: str) -> float:
        start = clock()
        candidates[name]()
        return clock() - start

    def best(name: str) -> float:
        return min(times[name], default=first[name])

    def worth_repeating(name: str) -> bool:
        return best(name) <= max(seconds / 2, 5 * min(map(best, candidates)))

    for name in candidates:
        first[name] = once(name)
    for name in reversed(candidates):
        if worth_repeating(name):
            once(name)
    spent, rounds = 0.0, 0
    while rounds < least or (spent < seconds and rounds < most):
        for name in list(candidates)[:: 1 if rounds % 2 == 0 else -1]:
            if worth_repeating(name):
                times[name].append(once(name))
                spent += times[name][-1]
        rounds += 1
    times = {name: values or [first[name]] for name, values in times.items()}
    spec = TaskSpec(stmt="", setup="", num_threads=torch.get_num_threads())
    return {name: Measurement(number_per_run=1, raw_times=values, task_spec=spec) for name, values in times.items()}


def per_call(run: Callable[[], Any], *, calls: int = 2000, repeats: int = 7) -> float:
    """Median seconds of one call among `repeats` loops of `calls`: for calls too short for the clock."""
    for _ in range(200):
        run()
    loops = []
    for _ in range(repeats):
        start = clock()
        for _ in range(calls):
            run()
        loops.append((clock() - start) / calls)
    return sorted(loops)[len(loops) // 2]


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one run needs at its peak beyond what was held before it; None where the machine does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status_kib("VmRSS")
        run()
        return 1024 * max(0, _status_kib("VmHWM") - before)
    except OSError:
        return None


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One case: our time beside the peers', as the JSON of every bench has it."""

    name: str
    ours: Measurement
    peers: dict[str, Measurement]
    fields: dict[str, Any]

    @property
    def best_peer(self) -> str:
        """The fastest peer by its median."""
        return min(self.peers, key=lambda name: self.peers[name].median)

    @property
    def ratio(self) -> float:
        """Best peer's median over ours: above 1 we are faster."""
        return self.peers[self.best_peer].median / self.ours.median

    def as_json(self) -> dict[str, Any]:
        """The case as INTERFACES lists it."""
        return {
            "name": self.name,
            "ours_s": self.ours.median,
            "ours_iqr_s": self.ours.iqr,
            "peers_s": {name: peer.median for name, peer in self.peers.items()},
            "ratio": self.ratio,
            "runs": len(self.ours.raw_times),
            "peers_runs": {name: len(peer.raw_times) for name, peer in self.peers.items()},
            **self.fields,
        }


def allocator() -> str:
    """ "tuned" when GLIBC_TUNABLES raises malloc's mmap threshold, else "default"."""
    return "tuned" if "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "") else "default"


def rerun_with_other_allocator(script: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The cases of a bench run in a child process under the allocator that this process does not use.

    Args:
        script: path of the bench, which takes --json.
        arguments: the rest of its command line; they must keep it from coming here again.
    """
    environment = dict(os.environ)
    if allocator() == "tuned":
        environment.pop("GLIBC_TUNABLES")
    else:
        environment["GLIBC_TUNABLES"] = TUNED_ALLOCATOR
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "cases.json")
        command = [sys.executable, script, *arguments, "--json", path]
        subprocess.run(command, env=environment, check=True, timeout=600, stdout=subprocess.DEVNULL)
        cases = json.loads(Path(path).read_text())["cases"]
    return [{**case, "name": f"{case['name']}/allocator={case['allocator']}"} for case in cases]


def describe(case: Mapping[str, Any], details: Sequence[str] = ()) -> str:
    """A case of `Comparison.as_json` as lines for a reader, with a bench's own `details` among them."""
    peers = "  ".join(f"{name} {s * 1e3:.2f}" for name, s in case["peers_s"].items())
    lines = [
        f"{case['name']}  [{case['allocator']}]",
        f"  ms: k25sys {case['ours_s'] * 1e3:.2f} (iqr {case['ours_iqr_s'] * 1e3:.2f})  {peers}",
        f"  ratio to the best peer {case['ratio']:.2f} (median of {case['runs']} alternated runs)",
        *(f"  {detail}" for detail in details),
    ]
    if case.get("peak_bytes") is not None:
        sizes = "  ".join(f"{name} {b / 1e6:.0f}" for name, b in case["peers_peak_bytes"].items() if b is not None)
        lines.append(f"  peak extra memory, MB: k25sys {case['peak_bytes'] / 1e6:.0f}  {sizes}")
    lines += [f"  not run: {name} ({reason})" for name, reason in case.get("peers_unavailable", {}).items()]
    return "\n".join(lines)


def torch_computes_bf16() -> bool:
    """Whether torch has bf16 GEMMs on this CPU; without AVX-512-BF16 or AMX its fallback is tens of times slower."""
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(256, 256).to(dtype)
        torch.mm(a, a)  # the first call may compile
        runs[str(dtype)] = partial(torch.mm, a, a)
    fp32, bf16 = (min(result.raw_times) for result in alternate(runs, seconds=0.05).values())
    return bf16 < 5 * fp32


def machine() -> dict[str, Any]:
    """The machine that figures belong to."""
    model = platform.processor() or "unknown"
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__, "allocator": allocator()}


def write_json(path: str, bench: str, backends: dict[str, str], cases: list[dict[str, Any]]) -> None:
    """Writes the file that every bench writes for --json."""
    content = {"bench": bench, "machine": machine(), "build": build_info(), "backends": backends, "cases": cases}
    Path(path).write_text(json.dumps(content, indent=1) + "\n")
