"""llama.cpp's own server beside ours: built once from the sources in its Python package, run as a process on loopback.

The package holds llama.cpp whole, so the peer is of the very version that `peer.py` measures as a library.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.cpu import available_cores
from model.errors import InputError
from pipeline.bench.peer import REQUIREMENTS
from pipeline.bench.server_process import HOST, ServerProcess, free_port, running
from pipeline.fingerprint import ROOT
from pipeline.progress import say

SOURCE = REQUIREMENTS[0]
FOLDER = ROOT / "build/llama.cpp-server"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",  # one file, which outlives the build folder
    "GGML_NATIVE": "ON",  # for this very CPU, as peer.py builds the library
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # it would be downloaded
    "LLAMA_OPENSSL": "OFF",
}


def install() -> Path:
    """The server's binary, built when it is missing: about ten minutes on 2 cores, once. Needs cmake and a compiler."""
    binary, stamp = FOLDER / "llama-server", FOLDER / "built"
    wanted = "\n".join([SOURCE, *(f"{name}={value}" for name, value in OPTIONS.items())])
    if not (binary.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted):
        if shutil.which("cmake") is None:
            raise InputError("no cmake: install it (Debian, Ubuntu: apt-get install cmake) to have llama.cpp's server")
        say(f"building llama.cpp's server from {SOURCE} in {FOLDER.relative_to(ROOT)}; about ten minutes, once")
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            _build(Path(scratch), binary)
        stamp.write_text(wanted, encoding="utf-8")
    return binary


def _build(scratch: Path, binary: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    _run([*pip, "--no-binary", SOURCE.partition("=")[0], "--dest", str(scratch), SOURCE])
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(scratch, filter="data")
    (source,) = scratch.glob("*/vendor/llama.cpp")
    made = scratch / "made"
    _run(["cmake", "-S", str(source), "-B", str(made), *(f"-D{name}={value}" for name, value in OPTIONS.items())])
    _run(["cmake", "--build", str(made), "--target", "llama-server", "--parallel", str(available_cores())])
    (made / "bin/llama-server").replace(binary)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{' '.join(command)} failed; mend this, or leave llama.cpp out:\n{done.stderr[-2000:]}")


@contextmanager
def llama_server(gguf: Path, *, threads: int, slots: int, context: int) -> Iterator[ServerProcess]:
    """llama.cpp's server on a file, with that many replies at once and `context` tokens for each of them."""
    port = free_port()
    sizes = {"--threads": threads, "--threads-batch": threads, "--parallel": slots, "--ctx-size": slots * context}
    options = [text for name, value in sizes.items() for text in (name, str(value))]
    command = [str(install()), "--model", str(gguf), "--host", HOST, "--port", str(port), *options]
    with running([*command, "--offline"], port, "/health") as server:
        yield server
