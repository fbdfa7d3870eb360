"""The compiled engine against the same weights computed eagerly, and engines that must not be opened."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.architecture import Architecture
from model.artifact import write_manifest
from model.cpu import COMPILER_FLAGS, family, runs
from model.engine import Engine
from model.errors import InputError
from model.int4_linear import Int4, kernel, packed_bytes
from model.kernels import KERNELS
from model.kv_cache import new_caches
from model.llama import Network
from model.networks import Int4Folder, quantized_network
from model.program import PROGRAMS, CompiledModel, check_origin, compile_module, load_program, torch_version
from model.recipe import Recipe
from model.sampling import LogitsError, Sampling
from model.shards import read_shards
from model.tokenizer import Tokenizer
from tests.conftest import LLAMA31_ROPE, ROOT, TINY
from tests.model.conftest import (
    CONTEXT,
    SAME,
    all_logits,
    assert_chosen_as_by_the_reference,
    assert_same_logits,
    export,
    random_tokens,
    scattered,
    write_int4,
    write_random_model,
)

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
"""torch's compiler uses it when it is first imported."""

ROUNDED_OTHERWISE = 0.04
"""Of logits, as a part of the largest, on Arm: KleidiAI adds in float32, so now and then an activation gets another
int8, or a key another bf16, and all that follows sees it. Adding in float32 alone does as much to the reference: 0.023
on x86-64; KleidiAI itself 0.018. `test_layers_are_the_references` says what the weights and kernels do."""
ROWS_ROUNDED_OTHERWISE, ROW_ROUNDED_OTHERWISE = 0.005, 0.02
"""Share of a layer's rows to which that happened in the layer itself, 0.0035 at most; and by how much, 0.009."""
ONE_TABLE, TWO_TABLES = "groups, one table", "channels, two tables"


@pytest.fixture(scope="session", params=[ONE_TABLE, TWO_TABLES])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An int4 folder and its engine: the other tests' one, and one that differs from it wherever it can."""
    if request.param == ONE_TABLE:
        return request.getfixturevalue("int4"), request.getfixturevalue("engine_folder")
    root, architecture = tmp_path_factory.mktemp("other"), replace(TINY, rope_scaling=LLAMA31_ROPE, kv_heads=1)
    recipe = Recipe(scheme="int4-channel", embedding_bits=4, head_bits=16)
    int4 = write_int4(write_random_model(root / "model", architecture), recipe, root)
    return int4, export(int4, root / "engine")


@pytest.fixture
def engine(compiled: CompiledModel, engine_folder: Path) -> Engine:
    return Engine(compiled, Tokenizer.load(engine_folder), CONTEXT)


@pytest.fixture
def copied(engine_folder: Path, tmp_path: Path) -> Path:
    """A copy of the engine to damage."""
    return Path(copytree(engine_folder, tmp_path / "engine"))


# What the programs compute


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 65, CONTEXT])
def test_logits_are_the_references(folders: tuple[Path, Path], length: int) -> None:
    compiled = CompiledModel(folders[1])
    reference = quantized_network(Int4Folder(folders[0]), as_served=True, products=torch.float64)
    for seed in range(20):
        tokens = random_tokens(length, seed)
        within = ROUNDED_OTHERWISE if kernel() == "kleidiai" else SAME
        assert_same_logits(all_logits(compiled, tokens), all_logits(reference, tokens), within)


def test_layers_are_the_references(folders: tuple[Path, Path]) -> None:
    """Each layer and the head from the reference's own input, so that no difference is carried on."""
    compiled = CompiledModel(folders[1])
    reference = quantized_network(Int4Folder(folders[0]), as_served=True, products=torch.float64)
    apart_T = torch.cat([_apart(compiled, reference, random_tokens(length, 99)) for length in (1, 2, 17, 65, CONTEXT)])
    if kernel() == "kleidiai":
        assert (apart_T > SAME).float().mean() <= ROWS_ROUNDED_OTHERWISE
        assert apart_T.max() <= ROW_ROUNDED_OTHERWISE
    else:
        assert apart_T.max() <= SAME


def _apart(compiled: CompiledModel, reference: Network, tokens: list[int]) -> Tensor:
    """How far each row of each layer and of the head is from the reference's, as a part of its largest."""
    place = scattered(reference.architecture, len(tokens))
    pages = place.tables_BP.shape[1]
    both = [new_caches(reference.architecture, pages, model.kv_dtype) for model in (compiled, reference)]
    found = []
    with torch.inference_mode():
        x_TD = reference.embed(torch.tensor(tokens))
        assert torch.equal(compiled.embed(torch.tensor(tokens)), x_TD)
        for index, (ours, theirs) in enumerate(zip(*both, strict=True)):
            served_TD = compiled.layer(index, x_TD.clone(), place, ours)
            x_TD = reference.layer(index, x_TD, place, theirs)
            found.append((served_TD - x_TD).abs().amax(dim=1) / x_TD.abs().max())
        served_TV, logits_TV = compiled.head(x_TD).float(), reference.head(x_TD).float()
    return torch.cat([*found, (served_TV - logits_TV).abs().amax(dim=1) / logits_TV.abs().max()])


def test_greedy_tokens_are_the_references(engine: Engine, reference: Network) -> None:
    prompts = [random_tokens(length, seed) for length in (1, 16, 25, 120) for seed in range(5)]
    replies = [(prompt, list(engine.greedy(prompt, 60))) for prompt in prompts]
    assert all(len(reply) == 60 for _, reply in replies)
    assert_chosen_as_by_the_reference(reference, replies)


def test_greedy_reply_is_what_one_pass_predicts(engine: Engine, compiled: CompiledModel) -> None:
    """Prefill, then token by token over pages, against all at once: the same bits, so the same tokens."""
    for length in (1, 25, 130):
        prompt = random_tokens(length)
        reply = list(engine.greedy(prompt, 60))
        predicted = all_logits(compiled, [*prompt, *reply[:-1]])[length - 1 :]
        assert predicted.argmax(dim=-1).tolist() == reply


def test_logits_that_are_no_numbers_are_noticed(compiled: CompiledModel, engine: Engine) -> None:
    """The kernels round activations to 8 bits, which must not make numbers of what is none."""
    weight = compiled._layers[1][0]  # a norm
    for fault in (float("nan"), float("inf")):
        compiled._layers[1][0] = torch.full_like(weight, fault)
        try:
            with pytest.raises(LogitsError, match="logits are NaN or infinite"):
                list(engine.generate([5, 6, 7], Sampling(temperature=0)))
        finally:
            compiled._layers[1][0] = weight


# What an engine folder holds


def test_engine_says_what_it_is(engine_folder: Path, reference: Network) -> None:
    engine, manifest = Engine.load(engine_folder), json.loads((engine_folder / "manifest.json").read_text())
    assert (engine.context, engine.model_id) == (CONTEXT, "tiny")
    assert (manifest["cpu"], manifest["torch"], manifest["packing"]) == (family(), torch_version(), kernel())
    programs = {f"{name}.so" for name in PROGRAMS}
    assert set(manifest["files"]) == {KERNELS, "weights-00001.safetensors", "tokenizer.json", "chat.json", *programs}
    qkv = {"group": 32, "inputs": 128, "outputs": 256, "planes": 1}
    head = {"group": 32, "inputs": 128, "outputs": 512, "planes": 2}
    assert (manifest["forms"]["layers.1.qkv"], manifest["forms"]["head"]) == (qkv, head)
    assert engine.bytes_per_token < reference.bytes_per_token / 5


def test_engine_holds_every_weight_once(folders: tuple[Path, Path]) -> None:
    """Packed, to the byte; a tied embedding with as many bits as the head is the head."""
    folder = folders[1]
    manifest, tensors = json.loads((folder / "manifest.json").read_text()), read_shards(folder)
    arch, recipe = Architecture.from_dict(manifest["architecture"]), manifest["recipe"]

    def size(outputs: int, inputs: int, bits: int = 4) -> int:
        if bits == 16:
            return 2 * outputs * inputs
        group = 32 if recipe["scheme"] == "int4-g32" else inputs
        return packed_bytes(Int4(torch.empty(0), group, inputs, outputs, bits // 4), kernel())

    layer = [(arch.qkv_rows, arch.hidden), (arch.hidden, arch.heads * arch.head_dim)]
    layer += [(2 * arch.mlp, arch.hidden), (arch.hidden, arch.mlp)]
    norms = 4 * arch.hidden * (2 * arch.layers + 1)
    read = arch.layers * sum(size(*shape) for shape in layer) + norms
    read += size(arch.vocab, arch.hidden, recipe["head_bits"])
    one_table = arch.tied_head and recipe["embedding_bits"] == recipe["head_bits"]
    table = 0 if one_table else size(arch.vocab, arch.hidden, recipe["embedding_bits"])
    assert ("embedding" in tensors) == (not one_table)
    assert sum(tensor.nbytes for tensor in tensors.values()) == read + table
    assert CompiledModel(folder).bytes_per_token == read
    stored = sum(path.stat().st_size for path in folder.iterdir() if path.suffix not in (".so", ".json"))
    assert stored < read + table + 8192


# Engines that must not be opened


def edit_manifest(folder: Path, **changes: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({"torch": "1.0.0"}, f"torch 1.0.0 on {family()}"),
        ({"cpu": "riscv64"}, f"torch {torch_version()} on riscv64"),
        ({"cpu": f"{family()}+amx"}, f"torch {torch_version()} on {family()}+amx"),
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


def test_engine_packed_for_another_kernel_is_refused(copied: Path) -> None:
    edit_manifest(copied, packing="split-halves")
    with pytest.raises(InputError) as caught:
        Engine.load(copied)
    assert str(caught.value) == (
        f"{copied}: packed as 'split-halves', this machine's kernel reads {kernel()!r}: "
        'run "python -m pipeline run export" here'
    )


def cut(tensor: Tensor) -> Tensor:
    return tensor[:-1]


def extend(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[:16]])


@pytest.mark.parametrize("name", ["head", "layers.0.qkv", "layers.1.down"])
@pytest.mark.parametrize("damage", [cut, extend, Tensor.short])
def test_sealed_weight_of_another_size_is_refused(copied: Path, name: str, damage: Callable[[Tensor], Tensor]) -> None:
    """The program would read beyond it: native code does not look at sizes."""
    path, manifest = copied / "weights-00001.safetensors", json.loads((copied / "manifest.json").read_text())
    tensors = load_file(path)
    expected, tensors[name] = tensors[name].numel(), damage(tensors[name])
    save_file(tensors, path)
    kind = manifest.pop("kind")
    write_manifest(copied, kind, {field: manifest[field] for field in manifest if field not in ("format", "files")})
    found = f"{tensors[name].numel()} values of {tensors[name].dtype}, expected {expected} bytes"
    with pytest.raises(InputError, match=rf'{copied}: {name}: {found}.*: run "python -m pipeline run export"'):
        Engine.load(copied)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["weights-00001.safetensors", KERNELS, *(f"{name}.so" for name in PROGRAMS)])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_byte, r"SHA-256 [0-9a-f]{12}… found, [0-9a-f]{12}… expected"),
        (truncate, r"\d+ bytes found, \d+ expected"),
        (Path.unlink, "missing"),
    ],
)
def test_damaged_engine_is_refused(copied: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    damage(copied / name)
    with pytest.raises(InputError, match=rf'{copied / name}: {message}: run "python -m pipeline run"'):
        Engine.load(copied)


def test_int4_folder_is_no_engine(int4: Path) -> None:
    with pytest.raises(InputError, match="holds kind 'int4' in format 1, expected 'engine'"):
        Engine.load(int4)


@pytest.mark.parametrize("tokens", [CONTEXT + 1, 10 * CONTEXT])
def test_more_tokens_than_the_context_are_refused(engine: Engine, tokens: int) -> None:
    """A position beyond the rotary table, or a page beyond the table, would be read from memory that is not theirs."""
    asked: tuple[Callable[[], object], ...] = (
        lambda: engine.next_logits([5] * tokens),
        lambda: engine.begin([5, 6], tokens),
        lambda: next(engine.greedy([5, 6], tokens - 2)),
    )
    for ask in asked:
        with pytest.raises(InputError, match=f"{tokens} tokens.*the context holds {CONTEXT}"):
            ask()
    assert engine.next_logits([5] * CONTEXT).isfinite().all()


# Exports that must not be begun


@pytest.mark.parametrize("cpu", ["z80", "x86-64-v9", "x86-64-v2", "aarch64+sve9"])
def test_unknown_family_is_refused(int4: Path, tmp_path: Path, cpu: str) -> None:
    with pytest.raises(InputError, match=rf"the CPU family {cpu!r}|export\.cpu = {re.escape(cpu)}: this machine is "):
        export(int4, tmp_path / "engine", cpu=cpu)
    assert not (tmp_path / "engine").exists()


def test_family_that_this_machine_cannot_run_is_refused(int4: Path, tmp_path: Path) -> None:
    foreign = next(known for known in COMPILER_FLAGS if not runs(known))  # x86-64 or aarch64
    with pytest.raises(InputError) as caught:
        export(int4, tmp_path / "engine", cpu=foreign)
    assert str(caught.value) == (
        f"export.cpu = {foreign}: this machine is {family()} and cannot pack for it; export on one that can"
    )
    assert not (tmp_path / "engine").exists()


def test_compiling_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"no C\+\+ compiler 'no-such-compiler': install g\+\+"):
        compile_module(RootMeanSquare(), (torch.ones(1, 8),), None, tmp_path / "program.so")


# Processes that serve


def python(script: str, *arguments: str | Path, **environment: str) -> "subprocess.Popen[str]":
    """Starts a script in the tree, one thread."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},  # its lines are waited for
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


SERVE = """
import sys
from pathlib import Path
from model.engine import Engine
from model.sampling import Sampling
engine = Engine.load(Path(sys.argv[1]))
print("".join(piece.text for piece in engine.generate([5, 6, 7], Sampling(temperature=0, max_tokens=20))))
print(*{name.partition(".")[0] if not name.startswith("torch.") else name for name in sys.modules})
"""


def test_serving_compiles_nothing_and_loads_no_compiler(engine_folder: Path, engine: Engine, tmp_path: Path) -> None:
    """Without a compiler, and leaving nothing behind: torch unpacks programs into a temporary folder."""
    nowhere = str(tmp_path / "nowhere")
    process = python(SERVE, engine_folder, PATH=nowhere, CXX=nowhere, HOME=nowhere, TMPDIR=str(tmp_path))
    text, modules = process.communicate()[0].splitlines()
    assert list(tmp_path.iterdir()) == []
    assert text == "".join(piece.text for piece in engine.generate([5, 6, 7], Sampling(temperature=0, max_tokens=20)))
    loaded = set(modules.split())
    assert {"torch", "model", "tokenizers"} <= loaded
    assert not loaded & {"torch._inductor", "torch._dynamo", "transformers", "sentence_transformers", "torchao", "gguf"}


WAIT = SERVE.replace("print(*", "sys.stdin.read(); (") + "\n"


@contextmanager
def serving(folder: Path) -> Iterator[int]:
    """A process that has spoken and waits; yields its id."""
    process = python(WAIT, folder)
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield process.pid
    finally:
        process.communicate()


def mapped_kb(pid: int, path: Path) -> dict[str, int]:
    """What /proc says of a file that a process has mapped."""
    sizes: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.endswith("kB"):
            name, size, _ = line.split()
            sizes[name[:-1]] = sizes.get(name[:-1], 0) + int(size)
    return sizes


def test_weights_are_mapped_once_for_all_processes(engine_folder: Path) -> None:
    weights = engine_folder / "weights-00001.safetensors"
    kind = subprocess.run(["stat", "-f", "-c", "%T", weights], capture_output=True, text=True, check=True).stdout
    on_disk = kind.strip() not in ("tmpfs", "ramfs")  # in memory, nothing is behind a page: the kernel calls all dirty
    with serving(engine_folder) as one, serving(engine_folder) as other:
        for pid in (one, other):
            found = mapped_kb(pid, weights)
            assert found["Private_Dirty"] == found["Private_Clean"] == found["Anonymous"] == 0
            assert found["Shared_Dirty" if on_disk else "Shared_Clean"] == 0
            assert found["Shared_Clean" if on_disk else "Shared_Dirty"] > 0.9 * weights.stat().st_size / 1024


OLDER = [known for known in COMPILER_FLAGS if runs(known) and known != family()]
GREEDY = """
import json, sys
from pathlib import Path
from model.engine import Engine
engine = Engine.load(Path(sys.argv[1]))
print(json.dumps([list(engine.greedy(prompt, 60)) for prompt in json.load(sys.stdin)]))
"""


@pytest.mark.skipif(not OLDER, reason="there is no older family that this machine includes")
def test_engine_for_an_older_family_says_the_same(int4: Path, reference: Network, tmp_path: Path) -> None:
    """In a process of its own: of two engines in one, both use the kernels loaded first."""
    folder = export(int4, tmp_path / "engine", cpu=OLDER[-1])
    assert json.loads((folder / "manifest.json").read_text())["cpu"] == OLDER[-1]
    prompts = [random_tokens(length, seed) for length in (1, 30, 120) for seed in range(4)]
    said = json.loads(python(GREEDY, folder).communicate(json.dumps(prompts))[0])
    assert_chosen_as_by_the_reference(reference, list(zip(prompts, said, strict=True)))


# One program


class RootMeanSquare(torch.nn.Module):
    """A reduction long enough for a program to split it over threads."""

    def forward(self, x: Tensor) -> Tensor:
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
    path = tmp_path / "program.so"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compile_module(RootMeanSquare(), (torch.ones(1, 65536),), None, path)
    finally:
        torch.set_num_threads(before)
    assert float(load_program(path)([torch.full((1, 65536), 2.0)])[0]) == pytest.approx(2)
    served = python(RUN, path)
    said = served.communicate()[0]
    assert served.returncode == 0
    assert [float(line) for line in said.split()] == pytest.approx([3.0] * 4)


def test_compiling_leaves_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    monkeypatch.setattr("torch.export.export", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("stopped")))
    with pytest.raises(RuntimeError, match="stopped"):
        compile_module(RootMeanSquare(), (torch.ones(1, 8),), None, tmp_path / "program.so")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
