"""The decoupled encoder against an encoder in stage 0: balance, simulated clusters, and real steps in virtual time.

python perf/bench_dep.py [--steps N] [--figure FILE.svg] [--json FILE]

balance: of 200 drawn steps (lognormal pictures, videos, 4 to 256 ranks), how many plans are within 1.02 of the bound.
simulated/vision=X/MODE: `python -m k25sys plan` for K2.5 on 512 H800, PP16, VPP2, EP16, 128 micro-batches; X is the
    wanted share of media tokens. `few`: pictures too few and steps too short for a balance, where DEP loses most.
virtual/vision=X/MODE: real steps of a small model on four gloo processes in virtual time (see bench_pipeline), against
    text alone of as many tokens; exact counts beside them.
simulated_against_virtual_time: those steps simulated from costs that the even steps fit (the encoder's of a pack from
    its patches and pairs, the rest the median by stage, kind and length), against the odd ones.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k25sys.models.presets import preset
from k25sys.parallel.dep import Clip, EncoderCost, Pack, assign, make_packs
from k25sys.parallel.pipeline import Action, Kind
from k25sys.parallel.pipeline.virtual_time import predict, replay
from k25sys.planner.plan import Plan, make_plan
from k25sys.planner.request import PlanRequest
from perf import harness
from perf.virtual_steps import Case, Steps, record

SHARES = (0.05, 0.1, 0.2, 0.28, 0.4, 0.5, 0.6)
MODES = ("dep", "stage0")
K25 = PlanRequest(gpus=512, pp=16, vpp=2, ep=16, microbatches=128, video_share=0.1)
RANKS, MICROBATCHES, TOKENS = 4, 16, 256
VIRTUAL_SHARES = (0.1, 0.3, 0.5)
VISION = (Kind.VISION_FORWARD, Kind.VISION_BACKWARD)


# --- balance --------------------------------------------------------------------------------------------------------


def drawn_step(seed: int) -> tuple[list[Clip], int]:
    """Clips of a step and a number of ranks: 2 to 32 clips a rank, 15% of them videos."""
    generator = np.random.default_rng(seed)
    num_ranks = int(generator.choice([4, 8, 16, 32, 64, 128, 256]))
    clips = []
    for number in range(num_ranks * int(generator.integers(2, 33))):
        patches = min(max(float(np.exp(generator.normal(np.log(1600), 0.9))), 64.0), 16384.0)
        side = max(2, int(patches**0.5 / 2) * 2)
        frames = 4 if generator.random() < 0.15 else 1
        clips.append(Clip(number % num_ranks, number // num_ranks // 4, number // num_ranks, (frames, side, side)))
    return clips, num_ranks


def balance(count: int = 200) -> dict[str, Any]:
    """The case `balance`."""
    vision = preset("k25").vision
    assert vision is not None
    cost = EncoderCost.from_sizes(
        dim=vision.hidden_size, mlp_dim=vision.intermediate_size, num_layers=vision.num_hidden_layers
    )
    over = []
    for seed in range(count):
        clips, num_ranks = drawn_step(seed)
        over.append(assign(make_packs(clips, max_patches=4096), cost, num_ranks).over_lower_bound)
    within = sum(each <= 1.02 for each in over) / count
    print(f"balance: {within:.1%} of {count} drawn steps within 1.02 of the lower bound; the worst {max(over):.3f}")
    return {"name": "balance", "share_within_1.02_of_bound": within, "worst": max(over), "batches": count}


# --- simulated ------------------------------------------------------------------------------------------------------


def simulated() -> list[dict[str, Any]]:
    """Plans over shares of media tokens, and of steps with few pictures."""
    requests = {f"vision={share}": replace(K25, vision_share=share) for share in SHARES}
    requests["vision=0.28/images"] = replace(K25, vision_share=0.28, video_share=0.0)
    requests["vision=0.28/videos"] = replace(K25, vision_share=0.28, video_share=1.0)
    requests["few"] = replace(K25, vision_share=0.02, microbatches=16)
    cases = [
        _simulated_case(f"simulated/{name}/{mode}", make_plan(replace(request, vision=mode)))
        for name, request in requests.items()
        for mode in MODES
    ]
    for case in cases:
        ceiling = f", ceiling {case['ceiling']:.3f}" if "ceiling" in case else ""
        print(f"{case['name']}: {case['efficiency_vs_text']:.3f} of text alone{ceiling} (simulated)")
    return cases


def _simulated_case(name: str, plan: Plan) -> dict[str, Any]:
    case: dict[str, Any] = {
        "name": name,
        "label": "simulated",
        "efficiency_vs_text": plan.efficiency_vs_text,
        "vision_token_share": plan.token_share,
        "step_seconds": plan.step_seconds,
    }
    if plan.dep is not None:
        case |= {"ceiling": plan.dep.ceiling, "max_over_mean": plan.dep.max_over_mean}
    return case


def draw_figure(path: str, cases: list[dict[str, Any]]) -> None:
    """Efficiency over the share of media tokens: both modes and the ceiling."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "k25sys"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    of_share = [case for case in cases if case["name"].startswith("simulated/vision=") and case["name"].count("/") == 2]
    for mode, label in (("dep", "DEP"), ("stage0", "encoder in stage 0")):
        chosen = [case for case in of_share if case["name"].endswith(mode)]
        shares = [0.0, *(case["vision_token_share"] for case in chosen)]
        axes.plot(shares, [1.0, *(case["efficiency_vs_text"] for case in chosen)], marker="o", label=label)
        if mode == "dep":
            axes.plot(shares, [1.0, *(case["ceiling"] for case in chosen)], "k--", label="ceiling: perfect balance")
    axes.set(xlabel="media tokens / all tokens", ylabel="throughput / text alone", ylim=(0, 1.05))
    axes.set_title("K2.5, 512 H800, PP16 VPP2 EP16, 128 micro-batches: simulated", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})


# --- virtual time ---------------------------------------------------------------------------------------------------


def drawn_case(share: float, vision: str) -> Case:
    """Micro-batches of TOKENS tokens, of which about `share` are media: none in some, most in others."""
    generator, grids = np.random.default_rng(7), []
    for number in range(MICROBATCHES):
        fill = 0.25 + 0.6 * generator.random()
        has_media = int((number + 1) * share / 0.55) > int(number * share / 0.55)
        room, clips = int(fill * TOKENS) if has_media else 0, []
        while room >= 16:
            frames, h, w = int(generator.choice([1, 1, 1, 4])), *(2 * int(side) for side in generator.integers(4, 9, 2))
            if h * w // 4 <= room:
                clips.append((frames, h, w))
                room -= h * w // 4
        grids.append(tuple(clips))
    return Case(
        schedule="1f1b", num_ranks=RANKS, num_microbatches=MICROBATCHES, tokens=TOKENS, vision=vision,
        grids=tuple(grids),
    )  # fmt: skip


def makespan(steps: Steps, seconds: list[dict[Action, float]]) -> float:
    """Virtual seconds of a step of which every action takes its median."""
    return replay(steps.schedule, predict(seconds, lambda action: action)).makespan


def simulated_makespan(steps: Steps) -> float:
    """Of costs fitted to the even steps."""
    even = predict(steps.seconds[::2], lambda action: action)
    lengths = [_length(steps.case, number) for number in range(MICROBATCHES)]

    def key(action: Action) -> object:
        return action.stage, action.kind, (None if action.kind in VISION else lengths[action.microbatch])

    costs = predict(steps.seconds[::2], key)
    for kind in VISION:
        times = {action.microbatch: seconds for action, seconds in even.items() if action.kind is kind}
        if times:
            fitted = EncoderCost.fit([steps.packs[number] for number in times], list(times.values()))
            costs |= {action: fitted.of(steps.packs[action.microbatch]) for action in even if action.kind is kind}
    return replay(steps.schedule, costs).makespan


def _length(case: Case, number: int) -> int:
    """Media rows of a micro-batch."""
    return sum(h * w // 4 for _, h, w in case.grids[number])


def virtual(num_steps: int) -> list[dict[str, Any]]:
    """Real steps, DEP and stage 0 beside text alone, and the simulator beside them."""
    text = record(Case(schedule="1f1b", num_ranks=RANKS, num_microbatches=MICROBATCHES, tokens=TOKENS), num_steps)
    alone, cases, errors = makespan(text, text.seconds), [], {}
    for share in VIRTUAL_SHARES:
        for mode in MODES:
            steps = record(drawn_case(share, mode), num_steps)
            name = f"virtual/vision={share}/{mode}"
            cases.append(_virtual_case(name, steps, alone))
            if mode == "dep":
                replayed = makespan(steps, steps.seconds[1::2])
                errors[name] = abs(simulated_makespan(steps) - replayed) / replayed
            print(_describe(cases[-1]), flush=True)
    largest = max(errors.values())
    print(f"simulated against virtual time: off by {largest:.1%} at most")
    case = {"name": "simulated_against_virtual_time", "label": "virtual time", "largest_relative_error": largest}
    return [*cases, {**case, "relative_errors": errors}]


def _virtual_case(name: str, steps: Steps, alone: float) -> dict[str, Any]:
    case, seconds = steps.case, makespan(steps, steps.seconds)
    rows = sum(_length(case, number) for number in range(MICROBATCHES))
    tokens = MICROBATCHES * TOKENS
    packs: defaultdict[int, list[Pack]] = defaultdict(list)
    for rank, actions in steps.schedule.actions.items():
        packs[rank] = [steps.packs[a.microbatch] for a in actions if a.kind is Kind.VISION_FORWARD]
    return {
        "name": name,
        "label": "virtual time",
        "ours_s": seconds,
        "peers_s": {"text_alone": alone},
        "ratio": alone / seconds,
        "efficiency_vs_text": alone / seconds,
        "vision_token_share": rows / tokens,
        "patches_encoded_by_rank": [sum(pack.num_patches for pack in packs[rank]) for rank in range(RANKS)],
        "pairs_by_rank": [sum(pack.num_pairs for pack in packs[rank]) for rank in range(RANKS)],
        "row_bytes_exchanged": 2 * rows * steps.row_bytes if case.vision == "dep" else 0,
        "peak_saved_bytes": steps.peak_saved_bytes,
        "peak_bytes": None,
        "peers_peak_bytes": {},
    }


def _describe(case: dict[str, Any]) -> str:
    saved = [round(number / 1e6, 1) for number in case["peak_saved_bytes"]]
    return (
        f"{case['name']}: {case['efficiency_vs_text']:.3f} of text alone in virtual time at "
        f"{case['vision_token_share']:.1%} media tokens; by rank: patches {case['patches_encoded_by_rank']}, "
        f"MB saved for the backward {saved}; {case['row_bytes_exchanged'] / 1e6:.2f} MB of rows and gradients exchanged"
    )


def main() -> None:
    """Runs the cases, prints each, and writes figure and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="measured steps of each virtual case")
    parser.add_argument("--figure", metavar="FILE.svg", help="draw efficiency over the share of media")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    if arguments.steps < 4:
        parser.error(f"--steps: got {arguments.steps}, accepted at least 4")
    print(harness.machine(), flush=True)
    cases = [balance(), *simulated()]
    if arguments.figure:
        draw_figure(arguments.figure, cases)
    cases += virtual(arguments.steps)
    if arguments.json:
        harness.write_json(arguments.json, "dep", {"expert_mlp": "native", "messages": "torch (gloo)"}, cases)


if __name__ == "__main__":
    main()
