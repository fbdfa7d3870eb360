"""Counts the instructions of a decoded token's int4 products on emulated Arm: KleidiAI against ATen's own fallback.

    make count-arm64

Evidence that KleidiAI is reached, and what it is worth, that needs no Arm machine. Runs inside QEMU with the plugin of
count.c; shapes are SmolLM2-135M's, in groups of 32 and per row. The last line is JSON.
"""

import json
import os
import sys
from contextlib import suppress

import torch
from torch import Tensor

LAYERS = 30
PRODUCTS = {"qkv": (960, 576), "output": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}
HEAD = (2 * 49152, 576)
"""Outputs and inputs; the 8-bit head is two planes of 4 bits."""
FALLBACK_SHARE = 64
"""The fallback computes only this part of the head, which would take minutes; its work is per output."""


def main() -> None:
    torch.set_num_threads(1)
    figures = {}
    for name, group in (("int4-g32", 32), ("int4-channel", 0)):
        counts = {which: _token(group, which == "kleidiai") for which in ("kleidiai", "fallback")}
        figures[name] = {**counts, "ratio": round(counts["fallback"] / counts["kleidiai"], 1)}
        print(f"{name}: {counts['kleidiai'] / 1e6:.1f} million instructions per token with KleidiAI, "
              f"{counts['fallback'] / 1e6:.1f} million without", file=sys.stderr)  # fmt: skip
    print(json.dumps(figures))


def _token(group: int, kleidiai: bool) -> int:
    share = 1 if kleidiai else FALLBACK_SHARE
    layers = sum(_product(outputs, inputs, group or inputs, kleidiai) for outputs, inputs in PRODUCTS.values())
    return LAYERS * layers + share * _product(HEAD[0] // share, HEAD[1], group or HEAD[1], kleidiai)


def _product(outputs: int, inputs: int, group: int, kleidiai: bool) -> int:
    """Instructions of one token's product."""
    packed = _packed(outputs, inputs, group, kleidiai)
    x = torch.randn(1, inputs)
    multiply = torch.ops.aten._dyn_quant_matmul_4bit
    multiply(x, packed, group, inputs, outputs)
    before = _instructions()
    multiply(x, packed, group, inputs, outputs)
    return _instructions() - before


def _packed(outputs: int, inputs: int, group: int, kleidiai: bool) -> Tensor:
    """Packed weights. Scales of the type that KleidiAI does not take lead to the fallback, without a word."""
    grouped = group < inputs
    scales = torch.rand(outputs, inputs // group, dtype=torch.bfloat16 if grouped == kleidiai else torch.float32)
    bytes_ = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    packed: Tensor = torch.ops.aten._dyn_quant_pack_4bit_weight(bytes_, scales, None, group, inputs, outputs)
    assert (packed.dtype == torch.uint8) == kleidiai, packed.dtype
    return packed


def _instructions() -> int:
    """Asks the plugin, which answers on standard error."""
    read, write = os.pipe()
    stderr = os.dup(2)
    os.dup2(write, 2)
    try:
        with suppress(OSError):  # there is no such priority
            os.getpriority(99, 0)
    finally:
        os.dup2(stderr, 2)
    answer = os.read(read, 100)
    for end in (read, write, stderr):
        os.close(end)
    return int(answer.split()[1])


if __name__ == "__main__":
    main()
