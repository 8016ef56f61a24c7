"""The flags of `python -m k25sys eval`: without torch, so that every other command starts as fast as before."""

import argparse


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """What it evaluates and how; the flags of the model are added beside it."""
    parser.add_argument("task", metavar="TASK", nargs="?", help="a name of --list")
    parser.add_argument("file", metavar="FILE.jsonl", nargs="?", help="questions, one JSON object a line")
    parser.add_argument("--list", action="store_true", help="name the tasks, their rules and the report's scores")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--samples", type=int, metavar="K", help="replies to each question (default: the task's)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of a reply (default: the task's)")
    parser.add_argument("--max-sequences", type=int, default=16, metavar="N", help="replies that are sampled at once")
    parser.add_argument("--json", metavar="FILE", help="write the report with every reply")
