"""perf/compare.py finds what got worse, and only that."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perf import compare

CASE = {"name": "gemm/threads=1", "ours_s": 1.0, "peers_s": {"torch": 2.0}, "ratio": 2.0, "peak_bytes": 100}
RUN = {"bench": "fp8", "machine": {"cpu": "a"}, "cases": [CASE, {**CASE, "name": "overhead", "peak_bytes": None}]}


def status(monkeypatch: pytest.MonkeyPatch, folder: Path, current: Any, *options: str) -> int:
    for name, run in (("baseline", RUN), ("current", current)):
        (folder / name).write_text(json.dumps(run))
    monkeypatch.setattr("sys.argv", ["compare", str(folder / "baseline"), str(folder / "current"), *options])
    return compare.main()


def changed(**fields: Any) -> dict[str, Any]:
    run = copy.deepcopy(RUN)
    run["cases"][0].update(fields)
    return run


@pytest.mark.parametrize(
    "current",
    [RUN, changed(ours_s=1.05), changed(ours_s=0.1, ratio=20.0, peak_bytes=1), {**changed(ours_s=9.0), "machine": {}}],
)
def test_nothing_worse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, current: Any) -> None:
    assert status(monkeypatch, tmp_path, current) == 0


@pytest.mark.parametrize(
    ("current", "text"),
    [
        (changed(ours_s=1.2), "gemm/threads=1: ours_s: 1 in the baseline, 1.2 now"),
        (changed(ratio=1.7), "gemm/threads=1: ratio"),
        (changed(peak_bytes=120), "gemm/threads=1: peak_bytes"),
        (changed(ours_s=None), "ours_s: 1 in the baseline, missing now"),
        (changed(ratio=float("nan")), "ratio: 2 in the baseline, missing now"),
        ({**changed(ours_s=None), "machine": {}}, "ours_s: 1 in the baseline, missing now"),
        ({**RUN, "cases": RUN["cases"][:1]}, "overhead: missing"),
        ({**RUN, "bench": "moe"}, "bench: fp8 in the baseline, moe now"),
    ],
)
def test_what_is_worse_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], current: Any, text: str
) -> None:
    assert status(monkeypatch, tmp_path, current) == 1
    assert text in capsys.readouterr().out


def test_the_tolerance_is_the_callers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert status(monkeypatch, tmp_path, changed(ours_s=1.2), "--tolerance", "0.3") == 0


@pytest.mark.parametrize("break_it", [lambda run: run.pop("cases"), lambda run: run["cases"].append(CASE)])
def test_other_files_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, break_it: Callable[[dict[str, Any]], Any]
) -> None:
    run = copy.deepcopy(RUN)
    break_it(run)
    with pytest.raises(SystemExit, match="current"):
        status(monkeypatch, tmp_path, run)
