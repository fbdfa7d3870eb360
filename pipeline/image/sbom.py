"""Whether the image's list of packages can be attested: python -m pipeline.image.sbom sbom.spdx.json.

The list (an SBOM in SPDX 2, as JSON) is signed only after the image was pushed. So what the attestation would refuse
is found here, before the push.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from model.artifact import read_json
from model.errors import InputError
from pipeline.progress import say

FIT, TOO_LARGE, BAD_INPUT = 0, 1, 2
BYTES_MAX = 16 * 1024 * 1024
"""MAX_SBOM_SIZE_BYTES in src/sbom.ts of actions/attest v4, and MAX_PREDICATE_SIZE_BYTES in its src/predicate.ts."""
MIB = 1024 * 1024
LIST_AGAIN = "list the image's packages again, as spdx-json"
SMALLER = "leave the files out of it and keep the packages: `SYFT_FILE_METADATA_SELECTION=none` for the step that lists"


def check(file: Path) -> tuple[int, int]:
    """Bytes of the list, and packages in it. Raises InputError if it is not SPDX 2 or names no package."""
    content = read_json(file, LIST_AGAIN)
    version, packages = content.get("spdxVersion"), content.get("packages")
    if not isinstance(version, str) or not version.startswith("SPDX-2."):
        raise InputError(f"{file}: spdxVersion is {version!r}, and SPDX-2.… is expected; {LIST_AGAIN}")
    if not isinstance(packages, list) or not packages:
        raise InputError(f"{file}: it lists no packages; {LIST_AGAIN}")
    return file.stat().st_size, len(packages)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 it can be attested, 1 it is too large, 2 it is no such list."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.image.sbom", description="Checks that an image's list of packages can be attested."
    )
    parser.add_argument("file", type=Path, metavar="SBOM", help="SPDX 2, as JSON")
    file: Path = parser.parse_args(arguments).file
    try:
        size, packages = check(file)
    except InputError as fault:
        say(f"error: {fault}")
        return BAD_INPUT
    say(f"{file}: {packages} packages, {size / MIB:.1f} MiB of {BYTES_MAX // MIB} that can be attested")
    if size > BYTES_MAX:
        say(f"{file}: {size - BYTES_MAX} bytes too many; {SMALLER}")
        return TOO_LARGE
    return FIT


if __name__ == "__main__":
    sys.exit(main())
