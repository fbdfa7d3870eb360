"""Runs the real torchchat on the same model beside ours: tokens per second, first token, memory and load, in turn.

    python -m pipeline.bench.torchchat --checkout ~/torchchat          (or TORCHCHAT_DIR=~/torchchat)

torchchat needs a checkout: git clone https://github.com/pytorch/torchchat (tested: commit a1a7f370). It is copied,
its version check mended and torchao 0.13.0 laid over this project's torch, all in build/torchchat. The model is given
in its own layout, quantized and exported by its own command with the int4 nearest to ours: on aarch64 KleidiAI's. The
last line is JSON, and is kept in BUILD/reports/torchchat.json.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from model.artifact import manifest_digest, read_json, write_json
from model.checkpoint import SafetensorsCheckpoint
from model.cpu import available_cores, family
from model.errors import InputError
from model.tokenizer import Tokenizer
from model.torchchat_format import PARAMS, WEIGHTS, params_of, state_of
from pipeline.bench.measured import Ended, measured
from pipeline.fingerprint import ROOT
from pipeline.progress import quiet_libraries, say
from pipeline.stages import GATE_TEXT
from pipeline.windows import Text, text_windows

HOME = ROOT / "build/torchchat"
REQUIREMENTS = ("torchao==0.13.0", "pillow")
CONTEXT, PROMPT_TOKENS, OUTPUT_TOKENS = 1024, 64, 64
HOW_TO_GET_ONE = (
    "no checkout of torchchat: git clone https://github.com/pytorch/torchchat, then give its path with --checkout or "
    "in TORCHCHAT_DIR (the package of that name on the registry is another one)"
)
OURS = """
import sys, time
start = time.perf_counter()
import torch
from model.engine import Engine
from pathlib import Path
torch.set_num_threads(int(sys.argv[2]))
begin = time.perf_counter()
engine = Engine.load(Path(sys.argv[1]))
print("load", time.perf_counter() - begin)
prompt = engine.tokenizer.encode(sys.argv[3])
for _ in range(2):
    engine.forget()
    begin = time.perf_counter()
    tokens = engine.greedy(prompt, int(sys.argv[4]))
    next(tokens)
    first = time.perf_counter()
    count = sum(1 for _ in tokens)
    end = time.perf_counter()
print("first", first - begin)
print("tokens_s", count / (end - first))
"""
"""Our side, a process as torchchat's is; the second reply counts, as there."""


class Patch(NamedTuple):
    """A change to the copy of the checkout."""

    file: str
    before: str
    after: str


VERSION_CHECK = Patch(
    "torchchat/cli/cli.py",
    '(torch_version <= "2.3")',
    '(tuple(map(int, torch_version.split(".")[:2])) <= (2, 3))',
)
"""It compares versions as text, so that 2.13 is older than 2.3."""
KLEIDIAI = Patch(
    "torchchat/utils/quantize.py",
    "layout=PackedLinearInt8DynamicActivationIntxWeightLayout(),",
    'weight_scale_dtype=torch.bfloat16, layout=PackedLinearInt8DynamicActivationIntxWeightLayout(target="aten"),',
)
"""Without it KleidiAI is never reached."""
FIGURES = {
    "load_s": r"^Time to load model: ([\d.]+) seconds",
    "first_token_s": r"^Time to first token: ([\d.]+) sec",
    "tokens_s": r"^\s*Next token throughput: ([\d.]+) tokens/sec",
}
FELL_BACK = "Trying with QDQLayout"


class Setting(NamedTuple):
    """How torchchat quantizes."""

    dtype: str
    quantize: Mapping[str, Mapping[str, object]]
    patches: tuple[Patch, ...]


def setting(machine: str) -> Setting:
    """The int4 nearest to ours that works on a machine: groups of 32, embedding in 8 bits."""
    embedding = {"embedding": {"bitwidth": 8, "groupsize": 0}}
    if machine == "aarch64":
        linear: dict[str, dict[str, object]] = {
            "linear:a8wxdq": {"bitwidth": 4, "groupsize": 32, "has_weight_zeros": False}
        }
        return Setting("fp32", {**embedding, **linear}, (VERSION_CHECK, KLEIDIAI))
    return Setting("bf16", {**embedding, "linear:int4": {"groupsize": 32, "inner_k_tiles": 4}}, (VERSION_CHECK,))


class Torchchat:
    """An exported model and the command that runs it."""

    def __init__(self, checkout: Path, build: Path, threads: int) -> None:
        self.setting = setting(platform.machine())
        self._environment = _environment(threads)
        self._code = prepare(checkout, self.setting.patches)
        self._model = HOME / build.name
        self._threads = threads
        self._export(build)

    def generate(self, prompt: str) -> dict[str, float]:
        """Load, first token and decoding of a greedy reply, and the process's peak memory."""
        arguments = ["--prompt", prompt, "--temperature", "0", "--max-new-tokens", str(OUTPUT_TOKENS)]
        ended = self._run("generate", *arguments, "--num-samples", "2", "--aoti-package-path", str(self._package))
        figures = {name: re.findall(pattern, ended.text, re.MULTILINE) for name, pattern in FIGURES.items()}
        lacking = [name for name, found in figures.items() if not found]
        if lacking:
            raise InputError(f"torchchat printed no {', '.join(lacking)}; its output ends:\n{ended.text[-2000:]}")
        return {name: float(found[-1]) for name, found in figures.items()} | {"peak_mb": ended.peak_mb}

    @property
    def _package(self) -> Path:
        return self._model / "model.pt2"

    def _export(self, build: Path) -> None:
        """Once for a model, a setting and a number of threads, which torchchat compiles in."""
        stamp, wanted = (
            self._model / "made_of.json",
            {
                "int4": manifest_digest(build / "int4"),
                "quantize": self.setting.quantize,
                "threads": self._threads,
            },
        )
        if stamp.exists() and read_json(stamp) == wanted:
            return
        shutil.rmtree(self._model, ignore_errors=True)
        self._model.mkdir(parents=True)
        write_model(build / "checkpoint", self._model)
        say("torchchat exports the model; some minutes, once")
        options = ["--max-seq-length", str(CONTEXT), "--output-aoti-package-path", str(self._package)]
        ended = self._run("export", *options)
        if FELL_BACK in ended.text:
            raise InputError(f"torchchat fell back to unpacked int4, which says nothing:\n{ended.text[-2000:]}")
        write_json(stamp, wanted)

    def _run(self, verb: str, *options: str) -> Ended:
        files = {"checkpoint": WEIGHTS, "params": PARAMS, "tokenizer": "tokenizer.json"}
        model = [part for name, file in files.items() for part in (f"--{name}-path", str(self._model / file))]
        command = [sys.executable, "torchchat.py", verb, *model, "--device", "cpu", "--dtype", self.setting.dtype]
        if verb == "export":
            command += ["--quantize", json.dumps(self.setting.quantize)]
        return measured([*command, *options], self._code, self._environment)


def prepare(checkout: Path, patches: Sequence[Patch]) -> Path:
    """A mended copy of the checkout, and torchao beside it. Raises InputError if it is not the torchchat we know."""
    if not (checkout / "torchchat.py").exists():
        raise InputError(f"{checkout}: no torchchat.py there; {HOW_TO_GET_ONE}")
    code = HOME / "checkout"
    shutil.rmtree(code, ignore_errors=True)
    shutil.copytree(checkout, code, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    for file, before, after in patches:
        text = (code / file).read_text(encoding="utf-8") if (code / file).exists() else ""
        if before not in text:
            raise InputError(f"{checkout / file}: holds no {before!r}; check out commit a1a7f370 of torchchat")
        (code / file).write_text(text.replace(before, after), encoding="utf-8")
    packages = HOME / "packages"
    if not packages.exists():
        say(f"installing {', '.join(REQUIREMENTS)} for torchchat")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        partial = HOME / "packages.partial"
        done = subprocess.run(
            [*pip, "--target", str(partial), *REQUIREMENTS], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise InputError(f"pip could not install {', '.join(REQUIREMENTS)}:\n{done.stderr[-2000:]}")
        partial.rename(packages)
    return code


def write_model(checkpoint: Path, folder: Path) -> None:
    """The model in torchchat's layout; its end-of-text token is one that no reply holds, so that none ends early."""
    opened = SafetensorsCheckpoint(checkpoint)
    torch.save(state_of(opened), folder / WEIGHTS)
    write_json(folder / PARAMS, params_of(opened.architecture))
    shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")
    settings = read_json(checkpoint / "tokenizer_config.json")
    special = [token["content"] for token in read_json(checkpoint / "tokenizer.json")["added_tokens"]]
    write_json(folder / "tokenizer_config.json", {**settings, "eos_token": special[-1]})


def ours(build: Path, prompt: str, threads: int) -> dict[str, float]:
    """The same of our engine."""
    command = [sys.executable, "-c", OURS, str(build / "engine"), str(threads), prompt, str(OUTPUT_TOKENS)]
    ended = measured(command, ROOT, dict(os.environ))
    figures = dict(re.findall(r"^(load|first|tokens_s) ([\d.]+)$", ended.text, re.MULTILINE))
    names = {"load_s": "load", "first_token_s": "first", "tokens_s": "tokens_s"}
    return {name: float(figures[printed]) for name, printed in names.items()} | {"peak_mb": ended.peak_mb}


def _environment(threads: int) -> dict[str, str]:
    own = {"PYTHONPATH": str(HOME / "packages"), "TORCHINDUCTOR_CACHE_DIR": str(HOME / "cache")}
    return {**os.environ, **own, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table to standard output and JSON as its last line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench.torchchat", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--checkout", type=Path, default=os.environ.get("TORCHCHAT_DIR"), help="default: TORCHCHAT_DIR")
    parser.add_argument("--build", type=Path, default=ROOT / "build/embedded", help="build folder with an engine")
    parser.add_argument("--repetitions", type=int, default=5, help="interleaved repetitions (default 5)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="default: every core")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        if options.checkout is None:
            raise InputError(HOW_TO_GET_ONE)
        result = compare(Path(options.checkout).expanduser(), options.build, options.repetitions, options.threads)
    except InputError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    write_json(options.build / "reports/torchchat.json", result)
    print(json.dumps(result))
    return 0


def compare(checkout: Path, build: Path, repetitions: int, threads: int) -> dict[str, object]:
    """Both, in turn, after one round that does not count; prints the medians and their ratios."""
    torchchat = Torchchat(checkout, build, threads)
    tokenizer = Tokenizer.load(build / "engine")
    prompt = tokenizer.decode(text_windows(Text.read(ROOT / GATE_TEXT), tokenizer, PROMPT_TOKENS)[0].tolist())
    rounds = []
    for number in range(repetitions + 1):
        say(f"round {number} of {repetitions}")
        rounds.append((torchchat.generate(prompt), ours(build, prompt, threads)))
    names = ("tokens_s", "first_token_s", "load_s", "peak_mb")
    figures = {
        name: {
            "torchchat": _spread([theirs[name] for theirs, _ in rounds[1:]]),
            "ours": _spread([mine[name] for _, mine in rounds[1:]]),
            "ours_over_torchchat": _spread([mine[name] / theirs[name] for theirs, mine in rounds[1:]]),
        }
        for name in names
    }
    print(f"{PROMPT_TOKENS} tokens of prompt, {OUTPUT_TOKENS} of reply, {threads} threads; medians (least to most)\n")
    print("| | torchchat | ours | ours / torchchat |\n|---|---:|---:|---:|")
    for name, row in figures.items():
        print("|", " | ".join([name, *map(_cell, row.values())]), "|")
    how = {"dtype": torchchat.setting.dtype, "quantize": torchchat.setting.quantize}
    return {"cpu": family(), "threads": threads, "torchchat": how, "figures": figures}


def _cell(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.3g} ({spread['least']:.3g} to {spread['most']:.3g})"


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    sys.exit(main())
