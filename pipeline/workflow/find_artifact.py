"""Which run keeps an artifact: python -m pipeline.workflow.find_artifact NAME.

Jobs of one run find each other's artifacts by name alone. What an earlier run has kept is found by its run, for which
this asks GitHub. The name holds a digest of all that the content depends on, so that any run's would do; only those of
`main` and of the branch at work are taken, as with GitHub's caches, since others run code that nobody has accepted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from model.errors import InputError
from pipeline.progress import say
from pipeline.workflow.forge import Repository

MAIN = "main"
"""The branch whose pushes the workflow pipeline promotes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done, whether or not there is one; 2 bad input, or none where there must be one."""
    options = _parser().parse_args(arguments)
    try:
        run = Repository.of_this_run().keeper(options.name, {MAIN, os.environ.get("GITHUB_REF_NAME", MAIN)})
        if run is None and options.required:
            raise InputError(f"no run keeps {options.name}: run the workflow pipeline, which makes it")
    except InputError as fault:
        say(f"error: {fault}")
        return 2
    say(f"no run keeps {options.name} yet" if run is None else f"run {run} keeps {options.name}")
    if options.github_output and run is not None:
        with options.github_output.open("a", encoding="utf-8") as output:
            output.write(f"run={run}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.workflow.find_artifact",
        description="Finds the run that keeps the newest artifact of a name, on main or the branch at work.",
        epilog="environment: GITHUB_REPOSITORY, GITHUB_REF_NAME, and GITHUB_TOKEN with `permissions: actions: read`",
    )
    parser.add_argument("name", help="name of the artifact")
    parser.add_argument("--required", action="store_true", help="to find none is an error")
    parser.add_argument(
        "--github-output",
        type=Path,
        metavar="FILE",
        help="also write its `run` there, as a GitHub Actions step's output; nothing if there is none",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
