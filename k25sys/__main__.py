"""Command line of the package: `python -m k25sys {doctor, convert, verify}`."""

import argparse
import sys
from collections.abc import Callable


def main() -> int:
    """Parses the command line and runs one command. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m k25sys", description="k25sys, a systems library for training")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="check this machine and the installation; exit 0 when both are fit")
    convert = commands.add_parser("convert", help="rewrite a checkpoint in another layout, tensor by tensor")
    convert.add_argument("source", metavar="SRC", help="folder with config.json and safetensors, in any layout")
    convert.add_argument("folder", metavar="DST", help="a new folder")
    convert.add_argument("--layout", choices=("released", "transformers"), required=True)
    convert.add_argument("--experts", choices=("bf16", "int4"), required=True, help="whole, or packed in four bits")
    convert.add_argument(
        "--scale-rule", choices=("amax/7", "amax/7.5"), default="amax/7", help="of experts that are not packed yet"
    )
    verify = commands.add_parser("verify", help="exit 0 when a checkpoint is intact, else name the files at fault")
    verify.add_argument("folder", metavar="FOLDER")
    arguments = parser.parse_args()
    return {"doctor": _doctor, "convert": _convert, "verify": _verify}[arguments.command](arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from k25sys.doctor import run_doctor

    return run_doctor()


def _convert(arguments: argparse.Namespace) -> int:
    from k25sys.checkpoint import convert

    def run() -> str:
        convert(
            arguments.source, arguments.folder, layout=arguments.layout, experts=arguments.experts,
            scale_rule=arguments.scale_rule,
        )  # fmt: skip
        return f"{arguments.folder}: written"

    return _one_line("convert", run)


def _verify(arguments: argparse.Namespace) -> int:
    from k25sys.checkpoint import verify_folder

    return _one_line("verify", lambda: f"{arguments.folder}: intact: {verify_folder(arguments.folder)}")


def _one_line(command: str, run: Callable[[], str]) -> int:
    """Prints what `run` returns; of an error of the input or of the disk, one line. Returns the exit status."""
    try:
        print(run())
    except (ValueError, TypeError, OSError) as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
