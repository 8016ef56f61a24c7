"""Command line of the package: `python -m k25sys doctor`."""

import argparse
import sys


def main() -> int:
    """Parses the command line and runs one command. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m k25sys", description="k25sys, a systems library for training")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="check this machine and the installation; exit 0 when both are fit")
    parser.parse_args()
    from k25sys.doctor import run_doctor

    return run_doctor()


if __name__ == "__main__":
    sys.exit(main())
