"""A low-rank adapter: what training changed in a model, small enough to be kept in the repository.

The change of a matrix is kept as the product of two thin ones: its singular value decomposition, cut off after `rank`
values, is the nearest of that rank (Eckart and Young 1936). Vectors are kept whole. A training that wrote an adapter
uses the model that the adapter gives, never the one it had before: so a kept adapter and a new training of the same
data are the same model.

An adapter names what it was trained on. One that was trained on something else is not used, and says what differs.
Adapters of others, in PEFT's folders, say nothing of that; they fit if every matrix has the base's shape.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model.architecture import Architecture
from model.artifact import read_json
from model.checkpoint import EVERY, Checkpoint
from model.errors import InputError
from pipeline.fingerprint import describe_changes
from pipeline.progress import say

UP, DOWN, WHOLE = ".up", ".down", ".whole"
"""Endings of the tensors' names: a change is up [M, R] @ down [R, N], or stands whole."""
Tensors = Mapping[str, Tensor]
PEFT = {"lora_A.weight": DOWN, "lora_B.weight": UP}
"""Endings of PEFT's names."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The change, and what it was trained on, by name."""

    tensors: Tensors
    trained_on: Mapping[str, str]
    record: Mapping[str, Any] = field(default_factory=dict)
    """How the training went."""

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
        header = {"trained_on": dict(self.trained_on), "record": dict(self.record), "sha256": self.digest}
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
            adapter = cls(tensors=tensors, trained_on=header["trained_on"], record=header.get("record", {}))
        except (SafetensorError, KeyError, TypeError, ValueError) as fault:
            raise InputError(f"{file}: no adapter that can be read ({fault}); {remedy}") from fault
        if header.get("sha256") != adapter.digest:
            raise InputError(f"{file}: its content does not have the digest in its header, so it is damaged; {remedy}")
        return adapter

    @classmethod
    def kept(cls, file: Path, trained_on: Mapping[str, str]) -> "Adapter | None":
        """The adapter that is kept there, if it was trained on just this; says so, or what differs."""
        if not file.exists():
            say(f"  no {file.name} is kept in {file.parent}: training")
            return None
        adapter = cls.read(file)
        changes = describe_changes(adapter.trained_on, trained_on)
        if changes:
            say(f"  {file} was trained on something else ({'; '.join(changes[:3])}): training")
            return None
        say(f"  {file} was trained on just this: no training")
        return adapter

    @classmethod
    def of_peft(cls, folder: Path, architecture: Architecture) -> "Adapter":
        """A LoRA adapter as PEFT writes it. Raises InputError for one of another kind or another base."""
        config: dict[str, Any] = read_json(folder / "adapter_config.json")
        file = folder / "adapter_model.safetensors"
        rank, alpha = config.get("r", 0), config.get("lora_alpha", 0)
        known = isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0 and alpha > 0
        others = [name for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(name)]
        if config.get("peft_type") != "LORA" or others or not known or config.get("bias", "none") != "none":
            what = f"{others[0]} is set" if others else f"peft_type {config.get('peft_type')!r}, r {rank!r}"
            raise InputError(
                f"{folder / 'adapter_config.json'}: {what}; expected plain LoRA with r and lora_alpha, and no bias"
            )
        root = math.sqrt(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
        shapes, tensors = architecture.tensor_shapes(), {}
        try:
            with safe_open(file, framework="pt") as opened:
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no dict
        except (SafetensorError, OSError) as fault:
            raise InputError(f"{file}: no safetensors file that can be read ({fault}); copy it again") from fault
        for name, tensor in found.items():
            layer, dot, ending = name.removeprefix("base_model.model.").partition(".lora_")
            base, kind = f"{layer}.weight", PEFT.get((dot + ending).removeprefix("."))
            if kind is None or base not in shapes:
                raise InputError(f"{file}: tensor {name}: this base has no such matrix; was it trained on another?")
            rows, columns = shapes[base]
            expected = [rows, rank] if kind == UP else [rank, columns]
            if list(tensor.shape) != expected:
                raise InputError(
                    f"{file}: tensor {name} is {list(tensor.shape)}, but this base and r = {rank} ask for {expected}; "
                    "was it trained on another base?"
                )
            tensors[base + kind] = (root * tensor.double()).bfloat16()
        unpaired = [name for name in tensors if name.removesuffix(UP).removesuffix(DOWN) + UP not in tensors]
        unpaired += [name for name in tensors if name.removesuffix(UP).removesuffix(DOWN) + DOWN not in tensors]
        if unpaired or not tensors:
            raise InputError(f"{file}: {unpaired[0] if unpaired else 'no tensor'} has no counterpart; copy it again")
        return cls(tensors=tensors, trained_on={"given": str(folder)})

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        facts: Any = [dict(self.trained_on), dict(self.record)] if self.record else dict(self.trained_on)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class Adapted:
    """A checkpoint with an adapter: its tensors are the trained ones."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        self.architecture = base.architecture
        self._base, self._adapter = base, adapter

    def tensor(self, name: str, rows: slice = EVERY) -> Tensor:
        """In float64 up to the last rounding, so that every CPU gets the same ones."""
        base, factors = self._base.tensor(name, rows), self._adapter.tensors
        if name + UP not in factors:
            return base
        change = factors[name + UP][rows].double() @ factors[name + DOWN].double()
        return (base.double() + change).to(base.dtype)
