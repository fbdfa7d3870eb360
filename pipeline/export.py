"""Packs the int4 weights for this CPU's kernel and compiles the network's programs: the engine, ready to serve."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from model.artifact import manifest_digest, write_manifest
from model.errors import InputError
from model.int4_linear import kernel
from model.kernels import compiler_flags
from model.networks import Int4Folder, packed_weights
from model.program import Form, compile_programs, form_of, torch_version
from model.shards import read_shards, write_shards
from pipeline.configs import ExportConfig
from pipeline.licences import copy_licences
from pipeline.progress import say, track
from pipeline.target import compiled_for


def run(config: ExportConfig, int4: Path, engine: Path) -> None:
    """Writes the engine folder (kind "engine"): packed weights, programs, tokenizer, manifest."""
    folder = Int4Folder(int4)
    arch = folder.architecture
    if config.context_tokens > arch.context:
        raise InputError(
            f"export.context_tokens = {config.context_tokens}: this model was trained for {arch.context}; "
            "set it to that or less"
        )
    target = compiled_for("export.cpu", config.cpu)
    compiler_flags(target)
    engine.mkdir()
    forms: dict[str, Form] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, weight in packed_weights(folder, kernel(), track(range(arch.layers), "packing, layer")):
            if isinstance(weight, Tensor):
                yield name, weight
            else:
                forms[name] = form_of(weight)
                yield name, weight[0]

    write_shards(tensors(), engine)
    say(f"  compiling the kernels and three programs for {target}; about a minute")
    compile_programs(read_shards(engine), forms, arch, target, engine)
    for name in ("tokenizer.json", "chat.json"):
        shutil.copyfile(int4 / name, engine / name)
    copy_licences(int4, engine)
    kept = ("model_id", "licence", "source", "architecture", "recipe", "bits_per_weight")
    facts = {
        **{name: folder.manifest[name] for name in kept},
        "context": config.context_tokens,
        "packing": kernel(),
        "forms": forms,
        "cpu": target,
        "torch": torch_version(),
        "int4_manifest": manifest_digest(int4),
    }
    write_manifest(engine, "engine", facts)
