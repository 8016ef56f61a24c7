"""The kernels' source under AddressSanitizer with UBSan, and under ThreadSanitizer; each also sees a planted bug."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.cuda_on_cpu.build import gemm_sanitizer_program, sanitizer_program
from tests.cuda_on_cpu.planted_bugs import DROPPED_BARRIER, STORE_TOO_FAR

pytestmark = pytest.mark.timeout(300)


def run(program: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=0:exitcode=66",
    }
    return subprocess.run([program], capture_output=True, text=True, check=False, timeout=240, env=environment)


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_kernels_are_clean(kind: str) -> None:
    result = run(sanitizer_program(kind))
    assert (result.returncode, result.stdout) == (0, "all kernels ran\n"), result.stderr[-4000:]


def test_matrix_products_are_clean() -> None:
    result = run(gemm_sanitizer_program())
    assert (result.returncode, result.stdout) == (0, "all kernels ran\n"), result.stderr[-4000:]


def test_address_sanitizer_sees_a_store_too_far(tmp_path: Path) -> None:
    result = run(sanitizer_program("address", STORE_TOO_FAR.plant(tmp_path)))
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert "combine_kernel" in result.stderr


def test_thread_sanitizer_sees_a_dropped_barrier(tmp_path: Path) -> None:
    result = run(sanitizer_program("thread", DROPPED_BARRIER.plant(tmp_path)))
    assert result.returncode == 66
    assert "data race" in result.stderr
    assert "count_slots" in result.stderr
