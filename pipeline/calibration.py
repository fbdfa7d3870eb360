"""The quantized matrices of each layer in turn, fitted to what its inputs are once all layers before it are quantized.

Text goes through the network layer by layer. Each of a layer's four products is quantized by the inputs it gets from
what precedes it as quantized, so that later roundings make up for earlier ones.

Shape letters: T tokens, D hidden width, I inputs, O outputs.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import Checkpoint
from model.gptq import gptq
from model.int4_linear import Dense, linear
from model.llama import LayerWeights, Network, layer_place, rms_norm, swiglu
from model.llama import attention as attend_paged
from model.networks import float_network, layer_names
from model.quantization import Quantized, check_finite, quantize
from model.recipe import Recipe

STATES_KEPT = 4
"""Layers that may be quantized and not yet on the disk: a shard of them and more."""
WINDOW = 256
"""Tokens of the pieces that calibration text is read in."""


def calibrated_layers(
    checkpoint: Checkpoint, recipe: Recipe, windows: Sequence[Tensor], first: int, scratch: Path
) -> Iterator[dict[str, Quantized]]:
    """The quantized matrices of each layer from the `first` on, by the checkpoint's names.

    What comes to the latest layers is kept in `scratch`, so that a run that was cut short need not begin again.
    Raises InputError as `quantize` does.
    """
    # How large inputs are is seen well enough in bf16, at twice the speed; how they go together is not.
    network = float_network(checkpoint, torch.float32 if recipe.method == "gptq" else torch.bfloat16, streamed=True)
    if (saved := _states(scratch, first)).exists():
        begin, states = first, list(load_file(saved)["states"])
    else:
        begin, states = 0, list(network.embed(torch.cat(list(windows))).split([len(tokens) for tokens in windows]))
    for index in range(begin, len(network.layers)):
        _save(states, scratch, index)
        layer = _Layer(index, recipe, network.layers[index], network)
        states, quantized = layer.quantize(states), layer.quantized
        del layer  # its weights would be held until the next is asked for
        if index >= first:
            yield quantized


def _save(states: Sequence[Tensor], scratch: Path, layer: int) -> None:
    """Keeps what comes to a layer, and no longer what came to a layer long done."""
    partial = scratch / "states.partial"
    save_file({"states": torch.stack(list(states))}, partial)
    partial.replace(_states(scratch, layer))
    _states(scratch, layer - STATES_KEPT).unlink(missing_ok=True)


def _states(scratch: Path, layer: int) -> Path:
    return scratch / f"states-{layer:03d}.safetensors"


class _Layer:
    """One layer on its way: `quantized` fills up, product by product."""

    def __init__(self, index: int, recipe: Recipe, weights: LayerWeights, network: Network) -> None:
        self.quantized: dict[str, Quantized] = {}
        self._names, self._recipe, self._weights, self._network = layer_names(index), recipe, weights, network
        self._shapes = network.architecture.tensor_shapes()

    def quantize(self, states: list[Tensor]) -> list[Tensor]:
        """Takes the layer's inputs [T, D] of every window, and returns its outputs."""
        weights, eps = self._weights, self._network.architecture.norm_eps
        inputs = [rms_norm(x_TD, weights.attention_norm, eps) for x_TD in states]
        qkv = self._fitted("qkv", inputs)
        mixed = [self._attention(linear(x, qkv)) for x in inputs]
        output = self._fitted("output", mixed)
        states = [x_TD + linear(x, output) for x_TD, x in zip(states, mixed, strict=True)]
        inputs = [rms_norm(x_TD, weights.mlp_norm, eps) for x_TD in states]
        gate_up = self._fitted("gate_up", inputs)
        inputs = [swiglu(*linear(x, gate_up).chunk(2, dim=-1)) for x in inputs]
        down = self._fitted("down", inputs)
        return [x_TD + linear(x, down) for x_TD, x in zip(states, inputs, strict=True)]

    def _attention(self, qkv_TX: Tensor) -> Tensor:
        return attend_paged(qkv_TX, *layer_place(self._network, len(qkv_TX)))

    def _fitted(self, field: str, inputs: Sequence[Tensor]) -> Dense:
        """The quantized product as the following ones see it."""
        names, recipe, weight_OI = self._names[field], self._recipe, getattr(self._weights, field).weight
        sizes = [self._shapes[name][0] for name in names]
        for name, part_OI in zip(names, weight_OI.split(sizes), strict=True):
            check_finite(name, part_OI)
        group, steps = recipe.group(weight_OI.shape[1]), recipe.search_steps
        if recipe.method == "gptq":
            hessian_II = sum((x.T @ x for x in inputs[1:]), inputs[0].T @ inputs[0])
            whole = gptq(names[0], weight_OI, hessian_II, group, steps)
        else:
            energy_I = torch.stack([x.float().square().mean(dim=0) for x in inputs]).mean(dim=0)
            whole = quantize(names[0], weight_OI, 4, group, steps, energy_I)
        parts = zip(names, whole.values.split(sizes), whole.scales.split(sizes), strict=True)
        self.quantized |= {name: Quantized(values, scales, 4) for name, values, scales in parts}
        return Dense(whole.dequantize(weight_OI.dtype))
