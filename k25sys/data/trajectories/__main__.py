"""Command line: `python -m k25sys.data.trajectories --count N --seed S --output FILE.jsonl`."""

import argparse
import sys

from k25sys.data.trajectories.generate import write_conversations


def main() -> int:
    """Writes the file and prints what it has. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m k25sys.data.trajectories", description="write conversations of problems solved by programs"
    )
    parser.add_argument("--count", type=int, required=True, help="conversations")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other problems (default: 0)")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines; appears when it is whole")
    parser.add_argument("--jobs", type=int, default=1, help="sandboxes side by side (default: 1)")
    arguments = parser.parse_args()
    rejected = []

    def on_rejected(index: int, reason: str) -> None:
        rejected.append(index)
        print(f"trajectories: problem {index} is left out: {' '.join(reason.split())}", file=sys.stderr)

    try:
        write_conversations(
            arguments.output, arguments.count, arguments.seed, jobs=arguments.jobs, on_rejected=on_rejected
        )
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"trajectories: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {arguments.count} conversations, {len(rejected)} problems left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
