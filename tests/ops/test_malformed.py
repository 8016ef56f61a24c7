"""Thousands of malformed calls: each a clear Python error or a correct result, never a crash or a wrong result."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops import malformed_calls

CHUNK = 800
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("first", range(0, 4 * CHUNK, CHUNK))
def test_malformed_calls(first: int) -> None:
    command = [sys.executable, "-m", "tests.ops.malformed_calls", str(first), str(first + CHUNK)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    lines = result.stdout.splitlines()
    bad = [line for line in lines if "-> BAD" in line]
    assert not bad, f"{len(bad)} bad calls:\n" + "\n".join(bad[:20])
    assert result.returncode == 0, f"died in: {lines[-1] if lines else '?'}\n{result.stderr[-2000:]}"
    assert len(lines) == CHUNK
    refused = sum("-> error" in line for line in lines)
    assert CHUNK * 0.4 < refused < CHUNK * 0.95, "the generator makes nearly only valid, or only invalid, calls"


def test_the_judge_sees_wrong_results_and_unclear_errors() -> None:
    function, reference, arguments = malformed_calls.good_calls(0, malformed_calls.torch.float32)["swiglu"]

    def unclear(gate_up_MG: object) -> None:
        raise ValueError("bad input")

    def crash(gate_up_MG: object) -> None:
        raise RuntimeError("internal")

    def wrong(gate_up_MG: malformed_calls.Tensor) -> malformed_calls.Tensor:
        return function(gate_up_MG) + 0.01

    outcomes = [
        malformed_calls.judge("swiglu", "gate_up_MG", broken, reference, arguments)
        for broken in (unclear, crash, wrong, function)
    ]
    assert [outcome[:3] for outcome in outcomes] == ["BAD", "BAD", "BAD", "cor"]
