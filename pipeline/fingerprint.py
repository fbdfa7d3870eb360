"""What a stage's outputs depend on: digests of files, the code a module imports, and the packages that code uses."""

import ast
import functools
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.artifact import file_digest, write_json

ROOT = Path(__file__).resolve().parent.parent
FIRST_PARTY = ("model", "serving", "pipeline")
BY_VALUE = ROOT / "pipeline/configs.py"
"""Not part of the code digest: configurations are data, and enter a fingerprint field by field."""


class DigestMemo:
    """SHA-256 by file, remembered while the file's size, modification time and inode stay the same."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            known: Any = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            known = {}
        self._known: dict[str, list[Any]] = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        stat = path.stat()
        identity = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(str(path))
        if known is None or known[:3] != identity:
            known = self._known[str(path)] = [*identity, file_digest(path)]
        return str(known[3])

    def save(self) -> None:
        write_json(self._path, {path: known for path, known in self._known.items() if Path(path).exists()})


def describe_changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What differs between two fingerprints, a line each."""
    changes = []
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        shown = name.startswith(("configuration", "package", "cpu")) and old is not None and new is not None
        verb = "is new" if old is None else "is gone" if new is None else "changed"
        changes.append(f"{name} was {old}, is {new}" if shown else f"{name} {verb}")
    return changes


def imports_of(module_file: Path) -> tuple[list[Path], set[str]]:
    """First-party files and top-level third-party modules that a module imports, directly or through others.

    A module's native source, of the same name, belongs to it.
    """
    code: set[Path] = set()
    packages: set[str] = set()
    pending = [module_file]
    while pending:
        file = pending.pop()
        if file in code or file == BY_VALUE:
            continue
        code.add(file)
        code |= {native for native in [file.with_suffix(".cpp")] if native.exists()}
        for name in _imported_names(file, file.stat().st_mtime_ns):
            top = name.partition(".")[0]
            if top in FIRST_PARTY:
                found = ROOT / f"{name.replace('.', '/')}.py"
                pending += [found] if found.exists() else []
            elif top not in sys.stdlib_module_names:
                packages.add(top)
    return sorted(code), packages


def package_versions(modules: set[str]) -> dict[str, str]:
    """Installed versions of the distributions that provide these top-level modules."""
    names = {name for module in modules for name in _providers().get(module, [])}
    return {name: importlib.metadata.version(name) for name in sorted(names)}


@functools.cache
def _providers() -> Mapping[str, list[str]]:
    """Distributions by the top-level modules they provide; reading them all takes a while."""
    return importlib.metadata.packages_distributions()


@functools.cache
def _imported_names(file: Path, _modified_ns: int) -> tuple[str, ...]:
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(names)
