"""Packs the int4 weights for this CPU's kernel and compiles the network's programs: the engine, ready to serve."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from model.artifact import manifest_digest, write_manifest
from model.cpu import family
from model.errors import InputError
from model.networks import Int4Folder, packed_tensors
from model.program import compile_programs, torch_version
from model.shards import read_shards, write_shards
from pipeline.configs import ExportConfig
from pipeline.progress import say, track


def run(config: ExportConfig, int4: Path, engine: Path) -> None:
    """Writes the engine folder (kind "engine"): packed weights, programs, tokenizer, manifest."""
    folder = Int4Folder(int4)
    arch = folder.architecture
    if config.context_tokens > arch.context:
        raise InputError(
            f"export.context_tokens = {config.context_tokens}: this model was trained for {arch.context}; "
            "set it to that or less"
        )
    engine.mkdir()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from track(packed_tensors(folder), "packing")

    write_shards(tensors(), engine)
    say("  compiling the decoder layer (decode, prefill) and the head; about a minute")
    compile_programs(read_shards(engine), arch, config.context_tokens, engine)
    for name in ("tokenizer.json", "chat.json"):
        shutil.copyfile(int4 / name, engine / name)
    kept = ("model_id", "licence", "source", "architecture", "recipe", "bits_per_weight")
    facts = {
        **{name: folder.manifest[name] for name in kept},
        "context": config.context_tokens,
        "packing": "split-halves",
        "cpu": family(),
        "torch": torch_version(),
        "int4_manifest": manifest_digest(int4),
    }
    write_manifest(engine, "engine", facts)
