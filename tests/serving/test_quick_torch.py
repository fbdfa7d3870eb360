"""torch as servers import it, in a process of its own."""

import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = """
import sys
import serving.quick_torch
import torch
assert "torch._meta_registrations" not in sys.modules, "it was not left out"
generator = torch.Generator().manual_seed(7)
drawn = torch.multinomial(torch.tensor([0.1, 0.2, 0.7]), 20, replacement=True, generator=generator)
print(drawn.tolist())
import torch._meta_registrations
exported = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
assert exported.module()(torch.ones(1, 3)).shape == (1, 2)
"""


def test_it_draws_the_same_numbers_and_can_still_compile() -> None:
    plain = PROGRAM.replace("import serving.quick_torch\n", "").replace("assert", "assert True or", 1)
    quick, usual = (
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for program in (PROGRAM, plain)
    )
    assert quick == usual
