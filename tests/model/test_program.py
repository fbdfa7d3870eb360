"""The compiled engine against the same weights computed eagerly, and engines that must not be opened."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pipeline.export
from model.cpu import family
from model.engine import Engine
from model.errors import InputError
from model.llama import Network, sequence_logits
from model.networks import Int4Folder, quantized_network
from model.program import PROGRAMS, check_origin, compile_module, load_program, torch_version
from model.recipe import Recipe
from model.sampling import Sampling
from pipeline.configs import ExportConfig
from tests.conftest import LLAMA31_ROPE, TINY
from tests.model.conftest import load_tokenizer, write_int4, write_random_model

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
"""torch's compiler uses it when it is first imported."""

CONTEXT = 200
"""Not a multiple of the cache's step, so that the cache ends above it."""


@pytest.fixture(scope="session")
def int4(speaking_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(scheme="int4-g32", embedding_bits=8, head_bits=8)
    return write_int4(speaking_model, recipe, tmp_path_factory.mktemp("int4"))


@pytest.fixture(scope="session")
def engine_folder(int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled tiny model; takes most of a minute. Do not write to it."""
    folder = tmp_path_factory.mktemp("engines") / "engine"
    pipeline.export.run(ExportConfig(context_tokens=CONTEXT), int4, folder)
    return folder


@pytest.fixture(scope="session")
def engine(engine_folder: Path) -> Engine:
    return Engine.load(engine_folder)


@pytest.fixture(scope="session")
def eager(int4: Path) -> Network:
    return quantized_network(Int4Folder(int4), int8_activations=False)


@pytest.fixture
def copied(engine_folder: Path, tmp_path: Path) -> Path:
    """A copy of the engine to damage."""
    return Path(shutil.copytree(engine_folder, tmp_path / "engine"))


def random_tokens(count: int) -> list[int]:
    tokens: list[int] = torch.randint(2, 96, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    return tokens


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 40, 64, 65, CONTEXT])
def test_compiled_logits_are_the_eager_ones(engine: Engine, eager: Network, length: int) -> None:
    tokens = random_tokens(length)
    engine.forget()
    expected = sequence_logits(eager, torch.tensor(tokens))[-1]
    torch.testing.assert_close(engine.next_logits(tokens), expected, rtol=0, atol=1e-4)


def test_compiled_decoding_step_by_step_is_one_eager_pass(engine: Engine, eager: Network) -> None:
    tokens = random_tokens(60)
    engine.forget()
    logits = torch.stack([engine.next_logits(tokens[:end]) for end in range(20, 61)])
    assert engine.reused_tokens == 59
    torch.testing.assert_close(logits, sequence_logits(eager, torch.tensor(tokens))[19:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [1, 25, CONTEXT - 10])
def test_compiled_text_is_the_eager_one(engine: Engine, eager: Network, speaking_model: Path, length: int) -> None:
    reference = Engine(eager, load_tokenizer(speaking_model), CONTEXT)
    sampling = Sampling(temperature=0, max_tokens=40)
    texts = [list(one.generate(random_tokens(length), sampling)) for one in (engine, reference)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == min(40, CONTEXT - length)


def test_engine_says_what_it_is(engine: Engine, engine_folder: Path, eager: Network) -> None:
    manifest = json.loads((engine_folder / "manifest.json").read_text())
    assert (engine.context, engine.model_id) == (CONTEXT, "tiny")
    assert (manifest["cpu"], manifest["torch"]) == (family(), torch_version())
    assert {f"{name}.pt2" for name in PROGRAMS} <= set(manifest["files"])
    shapes = TINY.tensor_shapes()
    four = sum(torch.Size(shape).numel() for name, shape in shapes.items() if "proj" in name)
    eight, norms = torch.Size(shapes["lm_head.weight"]).numel(), 2 * TINY.layers * TINY.hidden
    assert engine.bytes_per_token == four // 2 + 4 * four // 32 + eight + 4 * eight // 32 + 4 * norms
    assert engine.bytes_per_token < eager.bytes_per_token / 5


def test_other_recipe_and_architecture_compile_too(tmp_path: Path) -> None:
    """Channel-wise int4, four-bit embedding, a tied head kept at 16 bits, scaled RoPE, one key-value head."""
    architecture = replace(TINY, tied_head=True, rope_scaling=LLAMA31_ROPE, kv_heads=1, layers=1)
    model = write_random_model(tmp_path / "model", architecture)
    int4 = write_int4(model, Recipe(scheme="int4-channel", embedding_bits=4, head_bits=16), tmp_path)
    pipeline.export.run(ExportConfig(context_tokens=128), int4, tmp_path / "engine")
    engine, eager = Engine.load(tmp_path / "engine"), quantized_network(Int4Folder(int4), int8_activations=False)
    for length in (1, 100):
        tokens = random_tokens(length)
        expected = sequence_logits(eager, torch.tensor(tokens))[-1]
        torch.testing.assert_close(engine.next_logits(tokens), expected, rtol=0, atol=1e-4)


def edit_manifest(folder: Path, **changes: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({"torch": "1.0.0"}, f"torch 1.0.0 on {family()}"),
        ({"cpu": "riscv64"}, f"torch {torch_version()} on riscv64"),
        ({"torch": "9.9.9", "cpu": "aarch64+sve9"}, "torch 9.9.9 on aarch64+sve9"),
    ],
)
def test_engine_compiled_elsewhere_is_refused(copied: Path, changes: dict[str, str], made: str) -> None:
    edit_manifest(copied, **changes)
    with pytest.raises(InputError) as caught:
        Engine.load(copied)
    assert str(caught.value) == (
        f"{copied}: compiled for {made}, this is torch {torch_version()} on {family()}: "
        'run "python -m pipeline run export"'
    )


def test_remedy_names_the_stage() -> None:
    with pytest.raises(InputError, match='run "python -m pipeline run export_embedder"'):
        check_origin({"torch": "1.0", "cpu": family()}, Path("embedder"), "export_embedder")


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("weights-00001.safetensors", flip_byte, "SHA-256"),
        ("prefill.pt2", flip_byte, "SHA-256"),
        ("decode.pt2", Path.unlink, "missing"),
        ("chat.json", Path.unlink, "missing"),
    ],
)
def test_damaged_engine_is_refused(copied: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    damage(copied / name)
    with pytest.raises(InputError, match=rf'{copied / name}: {message}.*: run "python -m pipeline run"'):
        Engine.load(copied)


def test_int4_folder_is_no_engine(int4: Path) -> None:
    with pytest.raises(InputError, match="holds kind 'int4' in format 1, expected 'engine'"):
        Engine.load(int4)


def test_compiling_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"no C\+\+ compiler 'no-such-compiler': install g\+\+"):
        compile_module(RootMeanSquare(), (torch.ones(1, 8),), None, tmp_path / "program.pt2")


class RootMeanSquare(torch.nn.Module):
    """A reduction long enough for a program to split it over threads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().mean(dim=-1, keepdim=True).sqrt()


RUN = """
import sys, torch
from pathlib import Path
from model.program import load_program
run = load_program(Path(sys.argv[1]))
for threads in (1, 2, 3, 16):
    torch.set_num_threads(threads)
    print(float(run([torch.full((1, 65536), 3.0)])[0]))
"""


def test_program_runs_with_any_number_of_threads(tmp_path: Path) -> None:
    """Compiled by two threads and served by sixteen: in a process of its own, since a fault would end it."""
    path = tmp_path / "program.pt2"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compile_module(RootMeanSquare(), (torch.ones(1, 65536),), None, path)
    finally:
        torch.set_num_threads(before)
    assert float(load_program(path)([torch.full((1, 65536), 2.0)])[0]) == pytest.approx(2)
    served = subprocess.run([sys.executable, "-c", RUN, str(path)], capture_output=True, text=True, check=False)
    assert served.returncode == 0, served.stderr
    assert [float(line) for line in served.stdout.split()] == pytest.approx([3.0] * 4)


def test_compiling_leaves_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    monkeypatch.setattr("torch.export.export", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("stopped")))
    with pytest.raises(RuntimeError, match="stopped"):
        compile_module(RootMeanSquare(), (torch.ones(1, 8),), None, tmp_path / "program.pt2")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
