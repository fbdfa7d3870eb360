"""Builds, loads and declares the native kernels of `kernels.cpp`: the products in int4 and int8, and paged attention.

The compiled programs call them as C functions. Here they are also torch operators, `torch.ops.emerald.int4_linear` and
`.paged_attention`, so that `torch.export` can trace them and tests can call them.

Shape letters: T tokens, O outputs, I inputs, K key-value heads, H head dim, B sequences, P pages of a sequence.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.artifact import file_digest
from model.cpu import COMPILER_FLAGS
from model.errors import InputError

SOURCE = Path(__file__).with_name("kernels.cpp")
KERNELS = "kernels.so"
"""The name beside the programs."""
REMEDY = 'run "python -m pipeline run export export_embedder"'
SHIMS = {
    "int4_linear": "AtenTensorHandle, AtenTensorHandle, int64_t, int64_t, int64_t, AtenTensorHandle*",
    "int8_linear": "AtenTensorHandle, AtenTensorHandle, int64_t, AtenTensorHandle*",
    "paged_attention": ", ".join(["AtenTensorHandle"] * 7 + ["AtenTensorHandle*"]),
}
"""C parameters of each kernel: the operator's arguments, then the result."""


def build(family: str, folder: Path) -> None:
    """Compiles `kernels.so` for a CPU family into `folder`. Needs g++."""
    torch_libraries = Path(torch.__file__).parent / "lib"  # already in the process when the kernels are loaded
    version = f'-DEMERALD_KERNELS="{file_digest(SOURCE)}"'
    compile_library(SOURCE, family, folder / KERNELS, version, f"-L{torch_libraries}", "-ltorch_cpu")


def compile_library(source: Path, family: str, library: Path, *options: str) -> None:
    """Compiles a C++ file for a CPU family. Needs g++."""
    flags = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno"]
    quiet = ["-fno-trapping-math", "-Wno-psabi"]
    command = [compiler(), *flags, *quiet, *compiler_flags(family), str(source), *options, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{' '.join(command)} failed:\n{done.stderr}")


def compiler() -> str:
    """The C++ compiler; raises InputError if there is none."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise InputError(f"no C++ compiler {name!r}: install g++ (Debian, Ubuntu: apt-get install g++), or set CXX")
    return name


def compiler_flags(family: str) -> tuple[str, ...]:
    """How to compile for a CPU family; raises InputError for one that has no kernel."""
    if family not in COMPILER_FLAGS:
        raise InputError(f"no kernel for the CPU family {family!r}; there are some for {', '.join(COMPILER_FLAGS)}")
    return COMPILER_FLAGS[family]


def load(folder: Path) -> None:
    """Makes a folder's kernels the ones that this process's programs and operators call.

    The first loaded stay: raises InputError for a folder whose kernels are of another source than those.
    """
    names = (str(folder / KERNELS), None)
    try:
        own, called = (_version(ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)) for name in names)
    except (OSError, ValueError) as fault:
        raise InputError(f"{folder}: {fault}: {REMEDY}") from fault
    if own != called:
        raise InputError(f"{folder}: its kernels are of another version than those this process has loaded: {REMEDY}")


def _version(library: ctypes.CDLL) -> str:
    return (ctypes.c_char * 64).in_dll(library, "emerald_kernels").value.decode()


@cache
def declare() -> dict[Any, list[str]]:
    """Declares the operators, once; returns each with the C function that a compiled program calls for it."""
    for name, (schema, function) in OPERATORS.items():
        torch.library.define(f"emerald::{name}", schema)
        torch.library.impl(f"emerald::{name}", "CPU")(function)
        torch.library.register_fake(f"emerald::{name}", SHAPES[name])
    return {
        getattr(torch.ops.emerald, name).default: [f"AOTITorchError aoti_torch_cpu_{name}({parameters})"]
        for name, parameters in SHIMS.items()
    }


def _int4_linear(x_TI: Tensor, packed: Tensor, group: int, inputs: int, outputs: int) -> Tensor:
    assert x_TI.dtype == torch.float32, x_TI.dtype
    x_TI, y_TO = x_TI.contiguous(), x_TI.new_empty(x_TI.shape[0], outputs)
    call(ctypes.CDLL(None), "emerald_int4_linear", x_TI, packed, x_TI.shape[0], group, inputs, outputs, y_TO)
    return y_TO


def _int8_linear(x_TI: Tensor, packed: Tensor, outputs: int) -> Tensor:
    assert x_TI.dtype == torch.float32, x_TI.dtype
    x_TI, y_TO = x_TI.contiguous(), x_TI.new_empty(x_TI.shape[0], outputs)
    call(ctypes.CDLL(None), "emerald_int8_linear", x_TI, packed, *x_TI.shape, outputs, y_TO)
    return y_TO


def _paged_attention(
    qkv: Tensor, rotary: Tensor, positions: Tensor, rows: Tensor, tables: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    tokens, (_, kv_heads, dim, _) = qkv.shape[0], keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    out = qkv.new_empty(tokens, heads * dim)
    tensors = (qkv.contiguous(), rotary.contiguous(), positions, rows, tables, keys, values)
    call(ctypes.CDLL(None), "emerald_paged_attention", *tensors, tokens, heads, kv_heads, dim, tables.shape[1], out)
    return out


def call(library: ctypes.CDLL, name: str, *arguments: Tensor | int | None) -> None:
    """Calls a C function with pointers to tensors' data, or null, and 64-bit integers."""
    getattr(library, name)(
        *(
            ctypes.c_int64(argument)
            if isinstance(argument, int)
            else ctypes.c_void_p(None if argument is None else argument.data_ptr())
            for argument in arguments
        )
    )


OPERATORS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "int4_linear": ("(Tensor x_TI, Tensor packed, int group, int inputs, int outputs) -> Tensor", _int4_linear),
    "int8_linear": ("(Tensor x_TI, Tensor packed, int outputs) -> Tensor", _int8_linear),
    "paged_attention": (
        "(Tensor qkv, Tensor rotary, Tensor positions, Tensor rows, Tensor tables, Tensor(a!) keys, Tensor(b!) values)"
        " -> Tensor",
        _paged_attention,
    ),
}
SHAPES: dict[str, Callable[..., Tensor]] = {
    "int4_linear": lambda x_TI, packed, group, inputs, outputs: x_TI.new_empty(x_TI.shape[0], outputs),
    "int8_linear": lambda x_TI, packed, outputs: x_TI.new_empty(x_TI.shape[0], outputs),
    "paged_attention": lambda qkv, rotary, positions, rows, tables, keys, values: qkv.new_empty(
        qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1] * keys.shape[2]
    ),
}
"""What each operator returns, without computing it."""
