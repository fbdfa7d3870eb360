"""torch as servers import it, in a process of its own."""

import subprocess
import sys

from tests.conftest import ROOT

DRAW = """
import torch
generator = torch.Generator().manual_seed(7)
drawn = torch.multinomial(torch.tensor([0.1, 0.2, 0.7]), 20, replacement=True, generator=generator)
print(drawn.tolist(), drawn.dtype, repr(torch.zeros(2, 3)[:, 1:]))
"""


def test_it_draws_the_same_numbers() -> None:
    assert _run("import serving.quick_torch\n" + DRAW) == _run(DRAW)


def test_a_use_of_what_is_left_out_is_an_error_that_tells_the_remedy() -> None:
    program = """
import serving.quick_torch
import torch
import torch.fx.experimental.symbolic_shapes
for use in (lambda: torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),)), torch.vmap, torch.fx.Graph):
    try:
        use()
    except ImportError as fault:
        print(fault)
"""
    assert _run(program).splitlines() == [
        "torch.export.export is left out here: import torch before serving.quick_torch",
        "torch._functorch.apis.vmap is left out here: import torch before serving.quick_torch",
        "torch.fx.Graph is left out here: import torch before serving.quick_torch",
    ]


def test_it_leaves_nothing_out_of_a_process_that_has_torch() -> None:
    program = """
import torch
import serving.quick_torch
exported = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
print(tuple(exported.module()(torch.ones(1, 3)).shape))
"""
    assert _run(program) == "(1, 2)\n"


def _run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
