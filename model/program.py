"""The network as three compiled programs (AOTInductor packages), and the model that runs them.

One decoder layer is one program, called for every layer with that layer's weights and KV cache as arguments: it is
compiled once whatever the depth, and nothing is compiled when serving. `decode` takes one token and reads the packed
int4 bytes directly; `prefill` takes many and multiplies dequantized weights; `head` gives one token's logits. The
number of tokens and of cache slots is dynamic.
"""

import fcntl
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from model.architecture import Architecture
from model.artifact import read_manifest
from model.cpu import family, runs
from model.errors import InputError
from model.int4_linear import Dense, Int4, Weight, dequantize, weight_named
from model.llama import KVCache, LayerWeights, decoder_layer, output_head
from model.shards import read_shards

Program = Callable[[Sequence[Tensor]], list[Tensor]]
PROGRAMS = ("decode", "prefill", "head")
PREFILL_TOKENS = 512
"""Most tokens that one call of `prefill` takes; longer prompts go through in pieces."""
SLOTS_STEP = 16
"""Cache slots are handed to a program in multiples of this."""


class _Layer(torch.nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(
        self, x_TD: Tensor, rotary_T2H: Tensor, positions_T: Tensor, keys: Tensor, values: Tensor, *weights: Tensor
    ) -> Tensor:
        return decoder_layer(x_TD, rotary_T2H, positions_T, keys, values, _unflatten(weights), self.eps)


class _Head(torch.nn.Module):
    def __init__(self, eps: float, form: Callable[..., Weight]) -> None:
        super().__init__()
        self.eps, self.form = eps, form

    def forward(self, x_1D: Tensor, norm_D: Tensor, *head: Tensor) -> Tensor:
        return output_head(x_1D, norm_D, self.form(*head), self.eps)


def compile_programs(tensors: dict[str, Tensor], arch: Architecture, context: int, folder: Path) -> None:
    """Compiles decode.pt2, prefill.pt2 and head.pt2 for this CPU's family into `folder`.

    `tensors` are the engine's packed weights; only their shapes and forms matter. Needs g++.
    """
    slots = torch.export.Dim("slots", min=SLOTS_STEP, max=context)
    tokens = torch.export.Dim("tokens", min=2, max=PREFILL_TOKENS)
    layer = _layer_arguments(tensors, 0)
    for name, count in (("decode", 1), ("prefill", 40)):
        varying = {0: tokens} if count > 1 else None
        shapes = {
            "x_TD": varying,
            "rotary_T2H": varying,
            "positions_T": varying,
            "keys": {0: slots},
            "values": {0: slots},
            "weights": (None,) * len(layer),
        }
        cache = torch.zeros(2, 4 * SLOTS_STEP, arch.kv_heads, arch.head_dim)
        new = (torch.zeros(count, arch.hidden), torch.zeros(count, 2, arch.head_dim), torch.arange(count))
        compile_module(_Layer(arch.norm_eps), (*new, *cache, *layer), shapes, folder / f"{name}.pt2")
    head = weight_named("head", tensors)
    arguments = (torch.zeros(1, arch.hidden), tensors["norm"], *_fields(head))
    compile_module(_Head(arch.norm_eps, type(head)), arguments, None, folder / "head.pt2")


def compile_module(module: torch.nn.Module, arguments: tuple[Tensor, ...], shapes: Any, path: Path) -> None:
    """Exports a module and packages its native code for this CPU's family at `path` (a .pt2 file). Needs g++."""
    _require_compiler()
    from torch._inductor import aoti_compile_and_package

    target = family()
    # Otherwise reductions are compiled for this machine's number of threads, and more of them overrun their buffers.
    options = {"cpp.dynamic_threads": True, **({"cpp.march": target} if target.startswith("x86-64") else {})}
    with torch.no_grad(), warnings.catch_warnings(), _compiler_scratch():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its pytree classes
        exported = torch.export.export(module.eval(), arguments, dynamic_shapes=shapes)
        aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)


def load_program(path: Path) -> Program:
    """The callable of a .pt2 file: flat list of tensors in, list of tensors out.

    Calls AOTInductor's loader directly: its Python wrapper imports the compiler, which costs seconds at start.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    return cast("Program", loader.run)


class CompiledModel:
    """The packed weights, memory-mapped, and the programs that read them."""

    dtype = torch.float32

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder, "engine")
        check_origin(self.manifest, folder, "export")
        self.architecture = Architecture.from_dict(self.manifest["architecture"])
        tensors = read_shards(folder)
        self._embedding = weight_named("embedding", tensors)
        self._norm, self._head = tensors["norm"], _fields(weight_named("head", tensors))
        self._layers = [_layer_arguments(tensors, layer) for layer in range(self.architecture.layers)]
        self.bytes_per_token = sum(tensor.nbytes for layer in (*self._layers, self._head) for tensor in layer)
        self._decode, self._prefill, self._run_head = (load_program(folder / f"{name}.pt2") for name in PROGRAMS)

    def embed(self, tokens_T: Tensor) -> Tensor:
        if isinstance(self._embedding, Dense):
            return self._embedding.weight[tokens_T].float()
        return dequantize(type(self._embedding)(*(field[tokens_T] for field in self._embedding)))

    def layer(self, index: int, x_TD: Tensor, rotary_T2H: Tensor, positions_T: Tensor, cache: KVCache) -> Tensor:
        program = self._decode if x_TD.shape[0] == 1 else self._prefill
        return program([x_TD, rotary_T2H, positions_T, *cache, *self._layers[index]])[0]

    def head(self, x_1D: Tensor) -> Tensor:
        return self._run_head([x_1D, self._norm, *self._head])[0]


def _layer_arguments(tensors: dict[str, Tensor], layer: int) -> list[Tensor]:
    prefix = f"layers.{layer}."
    arguments: list[Tensor] = []
    for field in LayerWeights._fields:
        if field.endswith("norm"):
            arguments.append(tensors[prefix + field])
        else:
            arguments += _fields(weight_named(prefix + field, tensors))
    return arguments


def _unflatten(arguments: Sequence[Tensor]) -> LayerWeights:
    """The inverse of `_layer_arguments`; every matrix of a decoder layer is int4."""
    attention_norm, qkv, qkv_scales, output, output_scales, mlp_norm, *mlp = arguments
    gate_up, gate_up_scales, down, down_scales = mlp
    return LayerWeights(
        attention_norm,
        Int4(qkv, qkv_scales),
        Int4(output, output_scales),
        mlp_norm,
        Int4(gate_up, gate_up_scales),
        Int4(down, down_scales),
    )


def _fields(weight: Weight) -> list[Tensor]:
    return [field for field in weight if isinstance(field, Tensor)]


@contextmanager
def _compiler_scratch() -> Iterator[None]:
    """An empty compiler cache at a fixed place, one compilation at a time.

    Empty, so that nothing a killed compilation left half-written is used; fixed, because the path is part of the
    compiled bytes, and two builds of the same program should be the same file.
    """
    scratch = Path(tempfile.gettempdir()) / f"emerald-compile-{os.getuid()}"
    scratch.mkdir(exist_ok=True)
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with (scratch / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(scratch / "cache", ignore_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "cache")
        try:
            yield
        finally:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
            shutil.rmtree(scratch / "cache", ignore_errors=True)


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise InputError(f"no C++ compiler {compiler!r}: install g++ (Debian, Ubuntu: apt-get install g++), or set CXX")


def check_origin(manifest: dict[str, Any], folder: Path, stage: str) -> None:
    """Native code runs on the CPU family and the torch it was compiled for, and nowhere else."""
    here = {"torch": torch_version(), "cpu": family()}
    if manifest["torch"] != here["torch"] or not runs(manifest["cpu"]):
        made, found = (f"torch {facts['torch']} on {facts['cpu']}" for facts in (manifest, here))
        raise InputError(f'{folder}: compiled for {made}, this is {found}: run "python -m pipeline run {stage}"')


def torch_version() -> str:
    """The installed torch, without the build's suffix."""
    return str(torch.__version__).partition("+")[0]
