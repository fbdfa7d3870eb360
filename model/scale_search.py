"""The search for int4 scales, by the weights alone or by what their errors do to products.

Round-to-nearest with scale amax/7 wastes levels: most groups have one outlier and a mass near zero. Instead every
group tries scales s = ±f * amax / 7.5 for f in 0.5..1.15, rounds, refits s by least squares (s = Σwk / Σk²), and
keeps the s with the least squared error. A negative scale is worth trying because int4 is lopsided (-8..7): it
decides which tail gets the extra level.

Shape letters: O outputs, I inputs, G groups per row.
"""

import ctypes
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from model.cpu import family
from model.kernels import call, compile_library

SOURCE = Path(__file__).with_name("scale_search.cpp")


def search_scales(weight_OI: Tensor, group: int, steps: int, energy_I: Tensor | None = None) -> Tensor:
    """The least-squares int4 scale of every group, [O, G] float32, possibly negative; see the module's text.

    After refitting, the squared error, weighted with h = `energy_I` or 1, is Σhw² - (Σhwk)² / Σhk², so the best
    candidate has the largest (Σhwk)² / Σhk². A group of zeros gets scale 0.
    """
    weight_OI, (outputs, inputs) = weight_OI.float().contiguous(), weight_OI.shape
    scales_OG = torch.empty(outputs, inputs // group)
    factors = torch.linspace(0.5, 1.15, steps)
    energy_I = None if energy_I is None else energy_I.float().contiguous()
    call(_search(), "emerald_search_scales", weight_OI, energy_I, factors, steps, outputs, inputs, group, scales_OG)
    return scales_OG


@cache
def _search() -> ctypes.CDLL:
    """`scale_search.cpp`, compiled for this CPU in a second or two."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "scale_search.so"
        compile_library(SOURCE, family(), library)
        return ctypes.CDLL(str(library))
