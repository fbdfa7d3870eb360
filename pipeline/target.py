"""The CPU family that a stage compiles for."""

from model.cpu import family, runs
from model.errors import InputError


def compiled_for(setting: str, wished: str) -> str:
    """The family that a setting asks for, "native" being this machine's; InputError if this one does not include it."""
    target = family() if wished == "native" else wished
    if not runs(target):
        raise InputError(
            f"{setting} = {target}: this machine is {family()} and cannot pack for it; export on one that can"
        )
    return target
