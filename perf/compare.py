"""What got worse between two runs of a bench: exit status 0 if nothing did.

python perf/compare.py BASELINE CURRENT [--tolerance 0.1]

Both are files that a bench wrote with --json. A case of the baseline must be there, with every figure that it had:
`ours_s` and `peak_bytes` no larger and `ratio` no smaller, each within the tolerance. Seconds are compared only between
runs on the same machine; elsewhere the ratio to peers, measured in the same run, stands for them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

LARGER_IS_WORSE = {"ours_s": True, "peak_bytes": True, "ratio": False}


def read_run(path: str) -> dict[str, Any]:
    """A bench's JSON. Raises SystemExit, with the file's name, for anything else."""
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
        names = [case["name"] for case in run["cases"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"compare: {path}: not a file that a bench wrote with --json ({error})") from None
    if len(set(names)) < len(names):
        raise SystemExit(f"compare: {path}: two cases have the same name")
    return run


def findings(baseline: dict[str, Any], current: dict[str, Any], tolerance: float) -> list[str]:
    """One line for each figure that is missing or worse."""
    if baseline.get("bench") != current.get("bench"):
        return [f"bench: {baseline.get('bench')} in the baseline, {current.get('bench')} now"]
    metrics = dict(LARGER_IS_WORSE)
    if baseline.get("machine") != current.get("machine"):
        del metrics["ours_s"]
    now = {case["name"]: case for case in current["cases"]}
    lines = []
    for case in baseline["cases"]:
        name = case["name"]
        if name not in now:
            lines.append(f"{name}: missing")
            continue
        for metric in LARGER_IS_WORSE:
            before, after = case.get(metric), now[name].get(metric)
            if before is None:
                continue
            if not isinstance(after, (int, float)) or after != after:
                lines.append(f"{name}: {metric}: {before:.4g} in the baseline, missing now")
            elif metric in metrics and (
                after > before * (1 + tolerance) if metrics[metric] else after < before * (1 - tolerance)
            ):
                lines.append(f"{name}: {metric}: {before:.4g} in the baseline, {after:.4g} now")
    return lines


def main() -> int:
    """Prints the findings. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", metavar="BASELINE")
    parser.add_argument("current", metavar="CURRENT")
    parser.add_argument("--tolerance", type=float, default=0.1, help="share by which a figure may be worse")
    arguments = parser.parse_args()
    if not 0 <= arguments.tolerance < 1:
        raise SystemExit(f"compare: --tolerance: got {arguments.tolerance}, accepted 0 to below 1")
    baseline, current = read_run(arguments.baseline), read_run(arguments.current)
    if not baseline["cases"]:
        raise SystemExit(f"compare: {arguments.baseline}: no cases")
    lines = findings(baseline, current, arguments.tolerance)
    for line in lines:
        print(line)
    if not lines:
        print(f"{len(baseline['cases'])} cases, nothing worse by more than {arguments.tolerance:.0%}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
