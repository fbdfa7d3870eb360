"""`import torch` in half its time. To be imported before whatever else imports it.

The other half goes to registering operators and their shapes for compilers, and to Python's collector, which looks
again and again through objects that all stay. Nothing is compiled where programs are served. Who would compile in such
a process imports `torch._meta_registrations` first, as torch itself does elsewhere.
"""

import gc
import sys
from types import ModuleType

SHAPES = "torch._meta_registrations"

if "torch" not in sys.modules:
    gc.disable()
    sys.modules[SHAPES] = ModuleType(SHAPES)
    import torch

    del sys.modules[SHAPES], torch._meta_registrations
    if hasattr(torch._C, "_set_generator_metaclass"):  # what random generators need of the shapes, since torch 2.13
        from torch._opaque_base import OpaqueBaseMeta

        torch._C._set_generator_metaclass(OpaqueBaseMeta)
    gc.freeze()
    gc.enable()
