"""The network as three compiled programs (AOTInductor's shared libraries), and the model that runs them.

`embed` looks tokens up, `layer` is one decoder layer, called for every layer with that layer's weights and KV cache as
arguments, `head` gives logits: compiled once whatever the depth, and nothing is compiled when serving. Each takes any
number of tokens. A token brings its position and its sequence's pages, so that prefill, decode, a batch of sequences
and any mixture are the same program. What Inductor does not make fast is in `kernels.cpp`.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from model.architecture import Architecture
from model.artifact import Progress, read_manifest, unwatched
from model.cpu import family, runs
from model.errors import InputError
from model.int4_linear import Dense, Int4, Weight, check_packing, kernel, rows
from model.kernels import build, compiler, compiler_flags, declare
from model.kernels import load as load_kernels
from model.kv_cache import PAGE, KVCache, Place, new_caches, single_sequence
from model.llama import LayerWeights, decoder_layer, output_head, rotary_table
from model.shards import read_shards

Program = Callable[[Sequence[Tensor]], list[Tensor]]
Form = Mapping[str, int]
"""The fields of `Int4` beside its bytes; empty for a plain weight."""
PROGRAMS = ("embed", "layer", "head")
VECTOR_BITS = {"x86-64-v4": 512, "x86-64-v3": 256, "aarch64": 128}


class _Embed(torch.nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def forward(self, tokens_T: Tensor, table: Tensor) -> Tensor:
        weight = _weight(table, self.form)
        return weight.weight[tokens_T].float() if isinstance(weight, Dense) else rows(weight, tokens_T, kernel())


class _Layer(torch.nn.Module):
    def __init__(self, eps: float, forms: Mapping[str, Form]) -> None:
        super().__init__()
        self.eps, self.forms = eps, forms

    def forward(self, x_TD: Tensor, *tensors: Tensor) -> Tensor:
        """Takes the fields of `Place`, `KVCache` and `LayerWeights` one after the other."""
        place, cache = Place(*tensors[:4]), KVCache(*tensors[4:6])
        weights: list[Any] = [
            tensor if field.endswith("norm") else _weight(tensor, self.forms[field])
            for field, tensor in zip(LayerWeights._fields, tensors[6:], strict=True)
        ]
        return decoder_layer(x_TD, place, cache, LayerWeights(*weights), self.eps, _paged_attention)


class _Head(torch.nn.Module):
    def __init__(self, eps: float, form: Form) -> None:
        super().__init__()
        self.eps, self.form = eps, form

    def forward(self, x_TD: Tensor, norm_D: Tensor, head: Tensor) -> Tensor:
        return output_head(x_TD, norm_D, _weight(head, self.form), self.eps)


def _paged_attention(qkv_TX: Tensor, place: Place, cache: KVCache) -> Tensor:
    mixed_TX: Tensor = torch.ops.emerald.paged_attention(qkv_TX, *place, *cache)
    return mixed_TX


def _weight(tensor: Tensor, form: Form) -> Weight:
    return Int4(tensor, **form) if form else Dense(tensor)


def form_of(weight: Weight) -> Form:
    """What a weight's bytes do not say of themselves, for the manifest; empty for a plain one."""
    return {} if isinstance(weight, Dense) else {field: getattr(weight, field) for field in Int4._fields[1:]}


def compile_programs(
    tensors: dict[str, Tensor], forms: Mapping[str, Form], arch: Architecture, target: str, folder: Path
) -> None:
    """Builds the kernels and compiles embed.so, layer.so and head.so for a CPU family into `folder`.

    Of `tensors`, the engine's weights, only shapes and types matter. Needs g++.
    """
    if arch.head_dim % (2 * PAGE):
        raise InputError(
            f"head_dim {arch.head_dim}: the attention kernel needs a multiple of {2 * PAGE}; use another model"
        )
    build(target, folder)
    layer_forms = {field: forms[f"layers.0.{field}"] for field in LayerWeights._fields if f"layers.0.{field}" in forms}
    example = 24  # tokens; any number that is no other size here
    x_TD = torch.zeros(example, arch.hidden)
    place = single_sequence(rotary_table(arch, example + 1), example)
    place = place._replace(tables_BP=place.tables_BP.repeat(3, 1))
    cache = new_caches(replace(arch, layers=1), 5, torch.bfloat16)[0]
    layer = [tensors[f"layers.0.{field}"] for field in LayerWeights._fields]
    vary = torch.export.Dim.DYNAMIC
    place_shapes = ({0: vary}, {0: vary}, {0: vary}, {0: vary, 1: vary})
    shapes = {"x_TD": {0: vary}, "tensors": (*place_shapes, {0: vary}, {0: vary}, *[None] * len(layer))}
    compile_module(
        _Layer(arch.norm_eps, layer_forms), (x_TD, *place, *cache, *layer), shapes, folder / "layer.so", target
    )
    table = "embedding" if "embedding" in tensors else "head"
    tokens_T = torch.zeros(example, dtype=torch.int64)
    compile_module(
        _Embed(forms[table]),
        (tokens_T, tensors[table]),
        {"tokens_T": {0: vary}, "table": None},
        folder / "embed.so",
        target,
    )
    compile_module(
        _Head(arch.norm_eps, forms["head"]),
        (x_TD, tensors["norm"], tensors["head"]),
        {"x_TD": {0: vary}, "norm_D": None, "head": None},
        folder / "head.so",
        target,
    )


def compile_module(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    shapes: Any,
    path: Path,
    target: str | None = None,
    *,
    freezing: bool = False,
) -> None:
    """Exports a module and writes its native code to `path` (.so) for a CPU family, or this one. Needs g++.

    `freezing` folds the module's own weights into the program, laid out for the library that multiplies them.

    Only the library is kept of AOTInductor's package: torch would unpack that at every start into a folder that has to
    be writable and executable, which a container with a read-only root has not.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor import config as inductor

    target = target or family()
    options = {
        # Otherwise reductions are compiled for this machine's number of threads, and more overrun their buffers.
        "cpp.dynamic_threads": True,
        "aot_inductor.precompile_headers": False,  # they are kept outside the scratch folder, and need openssl
        "cpp.simdlen": VECTOR_BITS[target.partition("+")[0]],
        "aot_inductor.custom_ops_to_c_shims": declare(),
    }
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        _compiler_scratch(target) as cxx,
        # Its checks of frozen weights' sizes print addresses of this process: no two builds would be the same bytes.
        inductor.patch(freezing=freezing, size_asserts=not freezing),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its pytree classes
        warnings.filterwarnings("ignore", ".torch.jit.script_method.", DeprecationWarning)  # as its compiler is loaded
        exported = torch.export.export(module.eval(), arguments, dynamic_shapes=shapes)
        package = cxx.with_name("package.pt2")
        aoti_compile_and_package(
            exported, package_path=str(package), inductor_configs={**options, "cpp.cxx": (str(cxx),)}
        )
        with zipfile.ZipFile(package) as files:
            (library,) = (name for name in files.namelist() if name.endswith(".so"))
            path.write_bytes(files.read(library))
        package.unlink()


def load_program(path: Path) -> Program:
    """The callable of a compiled program: flat list of tensors in, list of tensors out.

    Calls AOTInductor's runner directly: torch's Python wrapper imports the compiler, which costs seconds at start.
    """
    return cast("Program", torch._C._aoti.AOTIModelContainerRunnerCpu(str(path.resolve()), 1).run)


class CompiledModel:
    """The packed weights, memory-mapped, and the programs that read them."""

    kv_dtype = torch.bfloat16

    def __init__(self, folder: Path, progress: Progress = unwatched) -> None:
        self.manifest = read_manifest(folder, "engine", progress)
        check_origin(self.manifest, folder, "export")
        self.architecture = Architecture.from_dict(self.manifest["architecture"])
        if self.manifest["packing"] != kernel():
            raise InputError(
                f"{folder}: packed as {self.manifest['packing']!r}, this machine's kernel reads {kernel()!r}: "
                'run "python -m pipeline run export" here'
            )
        tensors, forms = read_shards(folder), self.manifest["forms"]
        for name, form in forms.items():
            if form:
                check_packing(f"{folder}: {name}", Int4(tensors[name], **form), self.manifest["packing"])
        self._table = tensors.get("embedding", tensors["head"])
        self._norm, self._head = tensors["norm"], tensors["head"]
        self._layers = [
            [tensors[f"layers.{layer}.{field}"] for field in LayerWeights._fields]
            for layer in range(self.architecture.layers)
        ]
        read = [self._head, self._norm, *(tensor for layer in self._layers for tensor in layer)]
        self.bytes_per_token = sum(tensor.nbytes for tensor in read)
        load_kernels(folder)
        self._run_embed, self._run_layer, self._run_head = (load_program(folder / f"{name}.so") for name in PROGRAMS)

    def embed(self, tokens_T: Tensor) -> Tensor:
        return self._run_embed([tokens_T, self._table])[0]

    def layer(self, index: int, x_TD: Tensor, place: Place, cache: KVCache) -> Tensor:
        return self._run_layer([x_TD, *place, *cache, *self._layers[index]])[0]

    def head(self, x_TD: Tensor) -> Tensor:
        return self._run_head([x_TD, self._norm, self._head])[0]


@contextmanager
def _compiler_scratch(target: str) -> Iterator[Path]:
    """An empty compiler cache at a fixed place, one compilation at a time; yields the compiler for the target family.

    Empty, so that nothing a killed compilation left half-written is used; fixed, because the path is part of the
    compiled bytes, and two builds of the same program should be the same file. Inductor asks for the instructions of
    this very CPU; the last -march counts.
    """
    scratch = Path(tempfile.gettempdir()) / f"emerald-compile-{os.getuid()}"
    scratch.mkdir(exist_ok=True)
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with (scratch / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.getLogger(__name__).warning("waiting for another compilation to end (%s)", scratch / "lock")
            fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(scratch / "cache", ignore_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "cache")
        cxx = scratch / "g++"
        cxx.write_text(f'#!/bin/sh\nexec {compiler()} "$@" {" ".join(compiler_flags(target))}\n')
        cxx.chmod(0o755)
        try:
            yield cxx
        finally:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
            shutil.rmtree(scratch / "cache", ignore_errors=True)


def check_origin(manifest: dict[str, Any], folder: Path, stage: str) -> None:
    """Native code runs on the CPU family and the torch it was compiled for, and nowhere else."""
    here = {"torch": torch_version(), "cpu": family()}
    if manifest["torch"] != here["torch"] or not runs(manifest["cpu"]):
        made, found = (f"torch {facts['torch']} on {facts['cpu']}" for facts in (manifest, here))
        raise InputError(f'{folder}: compiled for {made}, this is {found}: run "python -m pipeline run {stage}"')


def torch_version() -> str:
    """The installed torch, without the build's suffix."""
    return str(torch.__version__).partition("+")[0]
