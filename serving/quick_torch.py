"""`import torch` in less than half of its time. To be imported before whatever else imports it.

The rest goes to what traces, compiles, quantizes and trains, and to Python's collector, which looks again and again
through objects that all stay. Where compiled programs are served none of it is needed, so it is left out: torch finds
stand-ins in its place, and says so where one is used. Who compiles in a process imports torch in it first.
"""

import gc
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

LEFT_OUT = (
    "torch._functorch",
    "torch._higher_order_ops",
    "torch._meta_registrations",
    "torch._native",
    "torch._subclasses",
    "torch.ao",
    "torch.distributions",
    "torch.export",
    "torch.fx",
    "torch.hub",
    "torch.masked",
    "torch.nested",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
    "torch.optim",
    "torch.profiler",
    "torch.quantization",
    "torch.utils.data",
    "torchgen",
)
PREFIXES = tuple(f"{package}." for package in LEFT_OUT)


class _StandIn(ModuleType):
    """A module, and a package, of which every name can be imported, and nothing be used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__} is left out here and has no {name}")

        def refuse(*_: object, **__: object) -> NoReturn:
            raise ImportError(f"{self.__name__}.{name} is left out here: import torch before {__name__}")

        return type(name, (), {"__new__": refuse})  # a class: annotations hold it, isinstance asks for it


class _StandIns:
    """What finds and loads them, for Python's import."""

    @classmethod
    def find_spec(cls, name: str, *_: object) -> ModuleSpec | None:
        left_out = f"{name}.".startswith(PREFIXES)
        return ModuleSpec(name, cls, is_package=True) if left_out else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    @staticmethod
    def exec_module(_: ModuleType) -> None:
        pass


if "torch" not in sys.modules:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's would be one more for each core, and spin for a while
    gc.disable()
    sys.meta_path.insert(0, _StandIns)
    import torch

    if hasattr(torch._C, "_set_generator_metaclass"):  # what random generators need of the shapes, since torch 2.13
        from torch._opaque_base import OpaqueBaseMeta

        torch._C._set_generator_metaclass(OpaqueBaseMeta)
    gc.freeze()
    gc.enable()
