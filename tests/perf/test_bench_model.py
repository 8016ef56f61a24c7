"""perf/bench_model.py: a step of `tiny` beside transformers', as the fields that every bench writes."""

import torch

from perf import bench_model


def test_a_case_of_the_tiny_preset() -> None:
    threads = torch.get_num_threads()
    try:
        case = bench_model.bench("tiny", "fp32", 1, seconds=0.0).as_json()
    finally:
        torch.set_num_threads(threads)
    assert case["name"] == "step/tiny/fp32/threads=1"
    assert case["peers_s"].keys() == case["peers_peak_bytes"].keys() == {"transformers"}
    assert case["ratio"] == case["peers_s"]["transformers"] / case["ours_s"]
    assert case["tokens_per_second"] == 256 / case["ours_s"]
    assert "tokens a second, 256 a step, 1.6 million parameters" in bench_model.describe(case)
