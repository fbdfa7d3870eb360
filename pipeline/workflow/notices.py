"""What must go with an engine that is passed on: python -m pipeline.workflow.notices build/NAME.

An artifact of a public repository is for whoever is signed in. So before an engine is kept as one, the copy of its
model's licence and the notices that the licence asks for are written to `notices/`, beside it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from model.artifact import MANIFEST, REMEDY, read_json
from model.errors import InputError
from pipeline.fingerprint import ROOT
from pipeline.licences import notices
from pipeline.progress import say


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done, 2 no copy of the licence came with the model."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.workflow.notices",
        description="Writes the licence and the notices of a build's engine to BUILD/notices.",
    )
    parser.add_argument("build", type=Path, help="a build folder")
    build: Path = parser.parse_args(arguments).build
    try:
        engine = build / "engine"
        written = notices(engine, read_json(engine / MANIFEST, REMEDY), ROOT / "LICENSE")
    except InputError as fault:
        say(f"error: {fault}")
        return 2
    place = build / "notices"
    place.mkdir(exist_ok=True)
    for name, text in written.items():
        (place / name).write_bytes(text)
    say(f"{place}: {', '.join(sorted(written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
