"""What this machine lacks for a build: its system, compiler, processor, memory, disk and Docker."""

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from model.cpu import COMPILER_FLAGS, runs
from model.errors import InputError
from pipeline.workflow.doctor.findings import Finding, error, ok, warning
from pipeline.workflow.probe import Needs, check

SECONDS = 10.0
"""How long a command may take to answer."""
MACHINES = ("x86_64", "aarch64")
OLDEST_ENGINE = (20, 10)
"""Of Docker; the image is built with BuildKit, which that version made its own."""
BUILDX_APART = (23, 0)
"""From this client on, Docker builds through its buildx plugin alone, which is a package of its own."""
FOR_IMAGE = "only make image needs it"


def machine(needs: Needs, target: str) -> list[Finding]:
    """Everything about this machine; nothing more once it is no Linux, where the other checks would not run."""
    system = operating_system()
    if system.level == "error":
        return [system]
    return [system, compiler(target), headers(), resources(needs, target), *docker()]


def operating_system() -> Finding:
    """Linux with glibc on a processor that there are packages for."""
    name, kind = platform.system(), platform.machine()
    if name != "Linux" or kind not in MACHINES:
        remedy = "use Linux on x86_64 or aarch64; on another system, a Linux container or virtual machine"
        return error("system", f"{name} on {kind}", remedy)
    library, version = platform.libc_ver()
    if library != "glibc":
        remedy = "PyTorch's packages need glibc: use Debian, Ubuntu or another system that has it, not Alpine"
        return error("system", f"{name} on {kind} without glibc", remedy)
    return ok("system", f"{name} on {kind}, glibc {version}")


def compiler(target: str) -> Finding:
    """A C++ compiler that knows the CPU family to compile for."""
    command = os.environ.get("CXX", "g++")
    if shutil.which(command) is None:
        return error("C++ compiler", f"no {command}", "apt-get install g++, or set CXX to the compiler you have")
    flags = COMPILER_FLAGS.get(target, ()) if runs(target) else ()  # another family is the processor's finding
    done = _run(command, *flags, "-fsyntax-only", "-x", "c++", os.devnull)
    if done.returncode:
        said = f"{command} {' '.join(flags)} fails: {_first_line(done.stderr)}"
        return error("C++ compiler", said, "install g++ 11 or newer, or set CXX to one")
    return ok("C++ compiler", command)


def headers() -> Finding:
    """Python's own C headers, which Debian and Ubuntu ship apart."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        remedy = "PyTorch's compiler may ask for it: apt-get install python3-dev"
        return warning("Python's headers", f"no {header.name}", remedy)
    return ok("Python's headers", header.name)


def resources(needs: Needs, target: str) -> Finding:
    """Processor, memory and disk, as pipeline.workflow.probe judges them."""
    try:
        return ok("machine", check(needs, target).removeprefix("this machine will do: "))
    except InputError as fault:
        return error("machine", str(fault))


def docker() -> Iterator[Finding]:
    """Docker's client, its engine and its buildx plugin."""
    if shutil.which("docker") is None:
        remedy = f"{FOR_IMAGE}: install Docker's client with its buildx plugin, and an engine"
        yield warning("Docker", "no docker command", remedy)
        return
    told = _run("docker", "version", "--format", "{{.Client.Version}} {{with .Server}}{{.Version}}{{end}}")
    client, _, engine = told.stdout.strip().partition(" ")
    if not engine:
        yield warning(
            "Docker's engine",
            f"none answers: {_first_line(told.stderr)}",
            f"{FOR_IMAGE}: start it (sudo systemctl start docker), set DOCKER_HOST to another, or, if permission is "
            "denied, join its group (sudo usermod -aG docker $USER) and log in again",
        )
    elif _version(engine) < OLDEST_ENGINE:
        oldest = ".".join(map(str, OLDEST_ENGINE))
        yield error("Docker's engine", engine, f"{FOR_IMAGE}, and it takes {oldest} or newer: install a newer one")
    else:
        yield ok("Docker's engine", engine)
    if _version(client) >= BUILDX_APART and _run("docker", "buildx", "version").returncode:
        yield warning("Docker's buildx", f"missing from client {client}", f"{FOR_IMAGE}: install docker-buildx-plugin")


def _version(text: str) -> tuple[int, ...]:
    """Major and minor; a build of one's own, which has no number, is not judged."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else OLDEST_ENGINE


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
    except (subprocess.TimeoutExpired, OSError) as fault:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} does not answer ({type(fault).__name__})")


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "it says nothing")
