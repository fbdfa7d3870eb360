"""A Llama whose matrices learn in few directions (LoRA), as the equations of its paper, differentiable.

Hu et al. 2021, "LoRA": a frozen matrix W [O, I] becomes W + scale · up [O, R] @ down [R, I], with `up` zero at first.
The network is that of `model.llama`, in bf16 products with float32 sums, norms and residuals, over one sequence in
which many dialogues stand: all of them see the prefix that they share, which is computed once, and none sees another.

Shape letters as in `model.llama`; T is all tokens of a sequence, R the rank.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, rms_norm, scaled_dot_product_attention, silu

from model.checkpoint import Checkpoint
from model.errors import InputError
from model.llama import rotary_table, rotate
from model.networks import EMBEDDING, HEAD, NORM, source_of
from pipeline.adapter import DOWN, UP

PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The matrices of a layer, which all learn."""


class Batch(NamedTuple):
    """Dialogues in one sequence, each after the prefix that all of them share."""

    tokens_T: Tensor
    positions_T: Tensor
    """Of each token in its own dialogue."""
    lengths: tuple[int, ...]
    """Of the prefix, and then of what each dialogue adds to it."""
    targets_N: Tensor
    """The tokens that the model has to say."""
    before_N: Tensor
    """The place in the sequence after which each of them is said."""


def batch_of(dialogues: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Batch:
    """Puts dialogues, as tokens and which of them are the model's to say, into one sequence."""
    first = dialogues[0][0]
    shortest = min(own.index(True) for _, own in dialogues) - 1
    shared = next((place for place in range(shortest) if len({tokens[place] for tokens, _ in dialogues}) > 1), shortest)
    tokens, positions = list(first[:shared]), list(range(shared))
    targets: list[int] = []
    before: list[int] = []
    for ids, own in dialogues:
        offset = len(tokens) - shared
        tokens += ids[shared:]
        positions += range(shared, len(ids))
        said = [place for place, mine in enumerate(own) if mine]
        targets += [ids[place] for place in said]
        before += [place - 1 + offset for place in said]
    lengths = (shared, *(len(ids) - shared for ids, _ in dialogues))
    return Batch(torch.tensor(tokens), torch.tensor(positions), lengths, torch.tensor(targets), torch.tensor(before))


class LoraNetwork:
    """A checkpoint's network with what it may learn; `learned` holds the factors by the adapter's names, in float32."""

    def __init__(self, checkpoint: Checkpoint, rank: int, scale: float, seed: int) -> None:
        self.architecture = checkpoint.architecture
        names = self.architecture.tensor_shapes()
        self._base = {name: checkpoint.tensor(name).bfloat16() for name in names}
        self._base[HEAD] = self._base[source_of(HEAD, self.architecture)]
        self._root = math.sqrt(scale)
        self.learned: dict[str, Tensor] = {}
        random = torch.Generator().manual_seed(seed)
        smallest = min(min(names[f"model.layers.0.{part}.weight"]) for part in PARTS)
        if rank > smallest:
            raise InputError(f"tune.rank = {rank}: a matrix of this model has {smallest}; choose at most {smallest}")
        for layer in range(self.architecture.layers):
            for part in PARTS:
                name = f"model.layers.{layer}.{part}.weight"
                rows, columns = names[name]
                bound = 1 / math.sqrt(columns)  # Kaiming uniform, as in LoRA's own code
                down = (torch.rand(rank, columns, generator=random) * 2 - 1) * bound
                self.learned[name + UP] = torch.zeros(rows, rank).requires_grad_()
                self.learned[name + DOWN] = down.requires_grad_()

    def factors(self) -> dict[str, Tensor]:
        """What an adapter keeps: up [O, R] and down [R, I] in bf16, their product being the change."""
        return {name: (self._root * factor.detach()).bfloat16() for name, factor in self.learned.items()}

    def loss(self, batch: Batch) -> Tensor:
        """Mean negative log-likelihood, in nats, of the tokens that the model has to say."""
        x_ND = self._states(batch)[batch.before_N]
        normed = rms_norm(x_ND, x_ND.shape[1:], self._base[NORM].float(), self.architecture.norm_eps)
        return cross_entropy(linear(normed.bfloat16(), self._base[HEAD]).float(), batch.targets_N)

    def _states(self, batch: Batch) -> Tensor:
        """What the last layer gives [T, D], in float32."""
        arch = self.architecture
        rotary_T2H = rotary_table(arch, int(batch.positions_T.max()) + 1)[batch.positions_T].bfloat16()
        x_TD = self._base[EMBEDDING][batch.tokens_T].float()
        for layer in range(arch.layers):
            x_TD = x_TD + self._attention(layer, self._normed(layer, "input", x_TD), rotary_T2H, batch.lengths)
            x_TD = x_TD + self._mlp(layer, self._normed(layer, "post_attention", x_TD))
        return x_TD

    def _attention(self, layer: int, h_TD: Tensor, rotary_T2H: Tensor, lengths: Sequence[int]) -> Tensor:
        arch = self.architecture
        q, k, v = (
            self._linear(layer, f"self_attn.{part}_proj", h_TD).view(len(h_TD), -1, arch.head_dim) for part in "qkv"
        )
        groups = arch.heads // arch.kv_heads
        q, k = rotate(q, rotary_T2H), rotate(k, rotary_T2H)
        k, v = (of.repeat_interleave(groups, dim=1) for of in (k, v))
        q, k, v = (of.transpose(0, 1)[None] for of in (q, k, v))
        mixed_TX = _attend(q, k, v, lengths)
        return self._linear(layer, "self_attn.o_proj", mixed_TX).float()

    def _mlp(self, layer: int, h_TD: Tensor) -> Tensor:
        gate, up = (self._linear(layer, f"mlp.{part}_proj", h_TD) for part in ("gate", "up"))
        return self._linear(layer, "mlp.down_proj", silu(gate) * up).float()

    def _normed(self, layer: int, which: str, x_TD: Tensor) -> Tensor:
        weight_D = self._base[f"model.layers.{layer}.{which}_layernorm.weight"].float()
        return rms_norm(x_TD, x_TD.shape[1:], weight_D, self.architecture.norm_eps).bfloat16()

    def _linear(self, layer: int, part: str, x: Tensor) -> Tensor:
        name = f"model.layers.{layer}.{part}.weight"
        up, down = ((self._root * self.learned[name + end]).bfloat16() for end in (UP, DOWN))
        return linear(x, self._base[name]) + linear(linear(x, down), up)


def _attend(q_1NTH: Tensor, k_1NTH: Tensor, v_1NTH: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal attention [T, N*H] of the prefix to itself, and of every dialogue to the prefix and itself.

    Tensors are a batch of one: with three dimensions torch takes a way that is five times as slow.
    """
    parts = zip(*(of.split(list(lengths), dim=2) for of in (q_1NTH, k_1NTH, v_1NTH)), strict=True)
    q, k_prefix, v_prefix = next(parts)
    mixed = [scaled_dot_product_attention(q, k_prefix, v_prefix, is_causal=True)] if lengths[0] else []
    for q, k, v in parts:
        seen = torch.ones(q.shape[2], lengths[0] + q.shape[2], dtype=torch.bool).tril(lengths[0])
        keys, values = torch.cat([k_prefix, k], dim=2), torch.cat([v_prefix, v], dim=2)
        mixed.append(scaled_dot_product_attention(q, keys, values, attn_mask=seen))
    return torch.cat(mixed, dim=2)[0].transpose(0, 1).flatten(1)
