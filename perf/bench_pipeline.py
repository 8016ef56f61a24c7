"""Pipeline schedules: their bubble, simulated and in virtual time, and how far the simulator is from virtual time.

python perf/bench_pipeline.py [--ranks N] [--microbatches N] [--steps N] [--json FILE]

Virtual time is the CPU time of each action of real steps on gloo processes (its thread's, so that waiting and whoever
shares the core do not count), replayed through the simulator as if every rank had a processor. The peer of a schedule
is one process that computes all micro-batches, over the number of ranks: the ratio is the ranks' efficiency.
simulated_against_virtual_time: the simulator is given one cost for all actions of a stage and kind, the median of the
even steps; virtual time is every action as long as it took, in the median of the odd steps.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from torch.utils.benchmark import Measurement, TaskSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k25sys.parallel.pipeline import Kind, simulate
from k25sys.parallel.pipeline.virtual_time import relative_error, replay
from perf import harness
from perf.harness import Comparison
from perf.virtual_steps import NUM_LAYERS, Case, Steps, record

SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zb_h1", 1))
UNIFORM = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.BACKWARD_INPUT: 1.0, Kind.BACKWARD_WEIGHT: 1.0}


def measurement(seconds: list[float]) -> Measurement:
    """Virtual seconds of steps."""
    return Measurement(number_per_run=1, raw_times=seconds, task_spec=TaskSpec(stmt="", setup="", num_threads=1))


def compare(steps: Steps, alone: Measurement) -> Comparison:
    """One schedule's case."""
    case = steps.case
    timelines = [replay(steps.schedule, seconds) for seconds in steps.seconds]
    uniform = simulate(case.make(), UNIFORM)
    middle = sorted(timelines, key=lambda timeline: timeline.makespan)[len(timelines) // 2]
    fields = {
        "label": "virtual time",
        "allocator": harness.allocator(),
        "bubble": middle.bubble,
        "bubble_of_equal_stages": uniform.bubble,
        "peak_in_flight": list(middle.peak_in_flight),
        "simulator_relative_error": relative_error(steps.schedule, steps.seconds),
        "peak_saved_bytes": steps.peak_saved_bytes,
        "peak_bytes": None,
        "peers_peak_bytes": {},
    }
    name = f"{case.schedule}/ranks={case.num_ranks}/microbatches={case.num_microbatches}"
    ours = measurement([timeline.makespan for timeline in timelines])
    return Comparison(name=name, ours=ours, peers={"one_process_over_ranks": alone}, fields=fields)


def describe(case: dict[str, Any]) -> str:
    """A case as lines for a reader."""
    megabytes = [round(saved / 1e6, 1) for saved in case["peak_saved_bytes"]]
    equal = case["bubble_of_equal_stages"]
    details = [
        f"bubble {case['bubble']:.1%} in virtual time; simulated with equal stages {equal:.1%}",
        f"efficiency of the ranks in virtual time {case['ratio']:.1%}",
        f"by rank: stages' activations in flight {case['peak_in_flight']}, MB saved for the backward {megabytes}",
        f"simulator off by {case['simulator_relative_error']:.1%}",
    ]
    return harness.describe(case, details)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, choices=(2, 4), help="of the pipeline")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=32, help="measured steps of each schedule")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    for name, least in (("microbatches", 1), ("tokens", 1), ("steps", 2)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: got {getattr(arguments, name)}, accepted at least {least}")
    return arguments


def main() -> None:
    """Runs the schedules, prints each, and writes the JSON."""
    arguments = parse_arguments()
    sizes = {"num_microbatches": arguments.microbatches, "tokens": arguments.tokens}
    print(f"{NUM_LAYERS} layers on {arguments.ranks} ranks, {sizes}\n{harness.machine()}", flush=True)
    one = record(Case(schedule="gpipe", num_ranks=1, **sizes), max(3, arguments.steps // 2))
    alone = measurement([sum(seconds.values()) / arguments.ranks for seconds in one.seconds])
    cases, errors = [], {}
    for name, virtual_stages in SCHEDULES:
        shape = Case(schedule=name, num_ranks=arguments.ranks, virtual_stages=virtual_stages, **sizes)
        cases.append(compare(record(shape, arguments.steps), alone).as_json())
        errors[name] = cases[-1]["simulator_relative_error"]
        print(describe(cases[-1]), flush=True)
    largest = max(errors.values())
    print(f"simulated against virtual time: off by {largest:.1%} at most", flush=True)
    case = {"name": "simulated_against_virtual_time", "label": "virtual time", "largest_relative_error": largest}
    cases.append({**case, "relative_errors": errors})
    if arguments.json:
        harness.write_json(arguments.json, "pipeline", {"expert_mlp": "native", "messages": "torch (gloo)"}, cases)


if __name__ == "__main__":
    main()
