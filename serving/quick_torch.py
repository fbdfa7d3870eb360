"""`import torch` in half its time. To be imported before whatever else imports it.

A quarter of that time registers the shapes of operators for compilers, and as much goes to Python's collector, which
looks again and again through objects that all stay. Nothing is compiled where programs are served. Who would compile
in such a process imports `torch._meta_registrations` first, as torch itself does elsewhere.
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
    import torch._prims.rng_prims  # random generators need it, and it came with the shapes

    gc.freeze()
    gc.enable()
