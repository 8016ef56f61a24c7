"""perf/bench_optimizer.py: every case runs, at small sizes, and has the fields that every bench writes."""

from typing import Any

import torch

from perf import bench_optimizer as bench


def test_cases_of_the_tiny_preset() -> None:
    threads = torch.get_num_threads()
    cases: list[dict[str, Any]] = []
    try:
        torch.set_num_threads(1)
        bench.run_cases(bench.PRESETS["tiny"], 0.0, cases.append)
    finally:
        torch.set_num_threads(threads)
    found = {case["name"].split("/")[0]: set(case["peers_s"]) for case in cases}
    assert found == {
        "newton_schulz": {"one_by_one"}, "muon": {"torch_muon"}, "zero_step": {"torch"},
        "adamw": {"torch_plain", "torch_foreach", "torch_fused"},
    }  # fmt: skip
    for case in cases:
        assert case["ratio"] == min(case["peers_s"].values()) / case["ours_s"]
        assert case["name"] in bench.describe(case)
