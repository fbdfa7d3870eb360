"""llama.cpp beside us: built from its Python package in an environment of its own, run as a process, asked in turn."""

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from model.errors import InputError
from pipeline.configs import named_config
from pipeline.fingerprint import ROOT
from pipeline.progress import say
from pipeline.sources import locate

REQUIREMENTS = ("llama-cpp-python==0.3.36", "numpy")
ENVIRONMENT = ROOT / "build/llama.cpp"


def peer_file(config: str) -> Path | None:
    """The GGUF file that a configuration's model comes from, for llama.cpp to run; None, and said, if there is none."""
    source = named_config(config).fetch
    if source.source.endswith(".gguf"):
        return locate(source.source, source.sha256)
    say("no GGUF file of this model is known: give one with --gguf to have llama.cpp beside us")
    return None


def install() -> Path:
    """The environment's Python, built when it is missing: some minutes, once, for this very CPU. Needs a compiler."""
    python, stamp = ENVIRONMENT / "bin/python", ENVIRONMENT / "built"
    wanted = "\n".join(REQUIREMENTS)
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        say(f"building {REQUIREMENTS[0]} in {ENVIRONMENT.relative_to(ROOT)}; some minutes, once")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        source = ["--no-binary", "llama-cpp-python", "--no-cache-dir"]  # built here, for this CPU
        for command in ([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], [*pip, *source, *REQUIREMENTS]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise InputError(
                    f"{' '.join(command)} failed; run without --gguf, or mend this:\n{done.stderr[-2000:]}"
                )
        stamp.write_text(wanted, encoding="utf-8")
    return python


class LlamaCpp:
    """A running llama.cpp; use as a context manager."""

    def __init__(self, gguf: Path, threads: int) -> None:
        worker = Path(__file__).with_name("peer_worker.py")
        command = [str(install()), str(worker), str(gguf), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = str(self._answer()["version"])

    def measure(self, sequences: int, prompt_tokens: int, tokens: int) -> dict[str, float]:
        """Tokens per second of `prefill` (prompts one after the other) and of `decode` (all sequences together)."""
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps({"sequences": sequences, "prompt": prompt_tokens, "tokens": tokens}) + "\n"
        )
        self._process.stdin.flush()
        return self._answer()

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise InputError(f"llama.cpp ended with exit code {self._process.wait()}; its message is above")
        answer: dict[str, float] = json.loads(line)
        return answer
