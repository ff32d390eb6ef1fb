"""python -m cuflash info | compile | check | bench"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cuflash.cli import bench, check, compile, info
from cuflash.cli.gpus import CommandError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status: 0 done, 1 something failed, 2 it could not be run."""
    parser = argparse.ArgumentParser(
        prog="python -m cuflash", description="cuflash on this machine"
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    for command in (info, compile, check, bench):
        command.add_parser(commands).set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except CommandError as error:
        print(f"cuflash: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
