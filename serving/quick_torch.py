"""`import torch` in half its time. To be imported before whatever else imports it.

A fifth of that time registers the shapes of operators for compilers, and more is Python's collector, which looks again
and again through objects that all stay. Nothing is compiled where programs are served. Who compiles later in such a
process finds the shapes as ever: the module that is left out is then imported by its name.
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
    gc.freeze()
    gc.enable()
