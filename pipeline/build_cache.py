"""Builds the FAISS index of every phrasing, with the answers, persona and prologue that belong to it."""

from dataclasses import asdict
from pathlib import Path

import faiss
import numpy as np

from model.artifact import write_json, write_manifest
from pipeline.author_data import read_document, read_entries, texts_of
from pipeline.configs import BuildCacheConfig
from pipeline.progress import track
from serving.embedder import Embedder


def run(
    config: BuildCacheConfig, entries: Path, persona: Path, prologue: Path, schemas: Path, embedder: Path, cache: Path
) -> None:
    """Writes the cache folder (kind "cache"): index.faiss, entries.json, and the decision's settings."""
    read = read_entries(entries, schemas)
    content = {
        "persona": read_document(persona, schemas / "persona.schema.json").content,
        "prologue": read_document(prologue, schemas / "prologue.schema.json").content,
        "entries": [asdict(entry) for entry in read],
    }
    embed = Embedder(embedder)
    texts = [text for _, text in texts_of(read)]
    vectors = np.stack([embed.embed(text) for text in track(texts, "embedding phrasings")])
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    cache.mkdir()
    faiss.write_index(index, str(cache / "index.faiss"))
    write_json(cache / "entries.json", content)
    facts = {"embedder": embed.digest, "policy": asdict(config), "entries": len(read), "phrasings": len(texts)}
    write_manifest(cache, "cache", facts)
