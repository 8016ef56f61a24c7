"""The flags of `python -m k25sys plan`: without torch, so that every other command starts as fast as before."""

import argparse

SWEPT = ("pp", "vpp", "ep", "tp", "cp", "microbatches", "schedule", "recompute", "vision", "vision_share")
"""Flags that --sweep takes."""


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of INTERFACES, "Planner"."""
    parser.add_argument("--preset", default="k25")
    parser.add_argument("--gpus", type=int, required=True)
    for name in ("pp", "vpp", "ep", "tp", "cp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=128, help="of one sequence, for each data-parallel rank")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--seed", type=int, default=0, help="of the media that are drawn")
    parser.add_argument("--schedule", default="interleaved_1f1b", help="gpipe, 1f1b, interleaved_1f1b or zb_h1")
    parser.add_argument("--recompute", default="selective", help="none or selective")
    parser.add_argument("--vision", default="none", help="none, stage0 or dep")
    parser.add_argument("--hardware", default="h800", help="h800, h100 or h200")
    parser.add_argument("--calibration", metavar="FILE", help="JSON of measured numbers in place of the preset's")
    parser.add_argument("--vision-share", type=float, default=0.0, help="media tokens of all tokens")
    parser.add_argument("--video-share", type=float, default=0.0, help="videos among the sequences with media")
    parser.add_argument("--uniform", action="store_true", help="equal stages and free links, as closed forms have it")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="FLAG=A,B,...", help=f"plans for each; {', '.join(SWEPT)}"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--svg", metavar="FILE", help="the schedule, drawn")
    parser.add_argument("--perfetto", metavar="FILE", help="the schedule for ui.perfetto.dev")
