"""A low-rank adapter: what training changed in a model, small enough to be kept in the repository.

The change of a matrix is kept as the product of two thin ones: its singular value decomposition, cut off after `rank`
values, is the nearest of that rank (Eckart and Young 1936). Vectors are kept whole. A training that wrote an adapter
uses the model that the adapter gives, never the one it had before: so a kept adapter and a new training of the same
data are the same model.

An adapter names what it was trained on. One that was trained on something else is not used, and says what differs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model.errors import InputError

UP, DOWN, WHOLE = ".up", ".down", ".whole"
"""Endings of the tensors' names: a change is up [M, R] @ down [R, N], or stands whole."""
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The change, and what it was trained on, by name."""

    tensors: Tensors
    trained_on: Mapping[str, str]

    @classmethod
    def between(cls, base: Tensors, trained: Tensors, rank: int, trained_on: Mapping[str, str]) -> "Adapter":
        """What training made of `base`, at most `rank` directions of every matrix, in bf16."""
        tensors: dict[str, Tensor] = {}
        for name, after in trained.items():
            change = after.double() - base[name].double()
            if not change.any():
                continue
            if change.ndim != 2:
                tensors[name + WHOLE] = change.float()
                continue
            left_MR, values_R, right_RN = torch.linalg.svd(change, full_matrices=False)
            roots_R = values_R[:rank].sqrt()
            tensors[name + UP] = (left_MR[:, :rank] * roots_R).bfloat16().contiguous()
            tensors[name + DOWN] = (roots_R[:, None] * right_RN[:rank]).bfloat16().contiguous()
        return cls(tensors=tensors, trained_on=trained_on)

    def merged(self, base: Tensors) -> dict[str, Tensor]:
        """The trained tensors; in float64 up to the last rounding, so that every CPU gets the same ones."""
        merged = dict(base)
        for part, tensor in self.tensors.items():
            name, dot, kind = part.rpartition(".")
            if dot + kind == WHOLE:
                merged[name] = (base[name].double() + tensor.double()).to(base[name].dtype)
            elif dot + kind == UP:
                change = tensor.double() @ self.tensors[name + DOWN].double()
                merged[name] = (base[name].double() + change).to(base[name].dtype)
        return merged

    def write(self, file: Path) -> None:
        """One safetensors file, what it was trained on and its own digest in the header."""
        header = {"trained_on": dict(self.trained_on), "sha256": _digest(self.tensors, self.trained_on)}
        # one text, since safetensors writes several in any order; not save_file, whose files only their owner may read
        file.write_bytes(save(dict(self.tensors), {"adapter": json.dumps(header)}))

    @classmethod
    def read(cls, file: Path) -> "Adapter":
        """Raises InputError for a file that is no adapter, or a damaged one."""
        remedy = "restore it from git, or delete it to train anew"
        try:
            with safe_open(file, framework="pt") as opened:
                header = json.loads((opened.metadata() or {})["adapter"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no dict
            trained_on = header["trained_on"]
        except (SafetensorError, KeyError, TypeError, ValueError) as fault:
            raise InputError(f"{file}: no adapter that can be read ({fault}); {remedy}") from fault
        if header.get("sha256") != _digest(tensors, trained_on):
            raise InputError(f"{file}: its content does not have the digest in its header, so it is damaged; {remedy}")
        return cls(tensors=tensors, trained_on=trained_on)


def _digest(tensors: Tensors, trained_on: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(trained_on), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
