"""Builds the FAISS index of every phrasing and contrast question, with the answers, persona and prologue.

Texts are embedded in shards, each of which is kept until the index is whole, so a build that was cut short goes on
where it ended. The index is exhaustive up to `flat_max` vectors and a graph beyond; either has the same bytes however
many shards it was made of. The exhaustive one keeps vectors in half precision, which moves a cosine by 2^-11 at most:
a search waits for memory, and reads all of them.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from model.artifact import write_json, write_manifest
from pipeline.author_data import read_contrast, read_document, read_entries, texts_of
from pipeline.configs import BuildCacheConfig
from pipeline.progress import track
from pipeline.stories import read_persona
from serving.embedder import Embedder

LINKS = 32
"""Of a vector in the graph (HNSW's M)."""
BREADTH_BUILT, BREADTH_SEARCHED = 200, 256
"""Candidates kept while the graph is built (efConstruction) and searched (efSearch): Malkov and Yashunin 2016."""


def run(
    config: BuildCacheConfig,
    entries: Path,
    contrast: Path,
    persona: Path,
    prologue: Path,
    schemas: Path,
    embedder: Path,
    cache: Path,
) -> None:
    """Writes the cache folder (kind "cache"): index.faiss, entries.json, and the decision's settings."""
    read = read_entries(entries, schemas)
    apart = [question.text for question in read_contrast(contrast, schemas, {entry.id for entry in read})]
    content = {
        "persona": read_persona(persona, schemas),
        "prologue": read_document(prologue, schemas / "prologue.schema.json").content,
        "entries": [{"id": entry.id, "answer": entry.answer, "phrasings": entry.phrasings} for entry in read],
        "contrast": apart,
    }
    embed = Embedder(embedder)
    texts = [text for _, text in texts_of(read)]
    vectors = _in_shards([*texts, *apart], embed, config.shard_texts, cache.with_name("shards"))
    shutil.rmtree(cache, ignore_errors=True)  # of a run that was cut short
    cache.mkdir()
    faiss.write_index(build_index(vectors, config.flat_max), str(cache / "index.faiss"))
    write_json(cache / "entries.json", content)
    facts = {
        "embedder": embed.digest,
        "policy": config.policy,
        "entries": len(read),
        "phrasings": len(texts),
        "contrast": len(apart),
    }
    write_manifest(cache, "cache", facts)


def build_index(vectors: NDArray[np.float32], flat_max: int) -> Any:
    """A FAISS index of unit vectors [N, D] by inner product; the same bytes from the same vectors."""
    if len(vectors) <= flat_max:
        index = faiss.IndexScalarQuantizer(vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        index.add(vectors)
        return index
    graph = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction, graph.hnsw.efSearch = BREADTH_BUILT, BREADTH_SEARCHED
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # with several, the links depend on who comes first
    graph.add(vectors)
    faiss.omp_set_num_threads(threads)
    return graph


def _in_shards(texts: Sequence[str], embedder: Embedder, size: int, folder: Path) -> NDArray[np.float32]:
    """Vectors [N, D] of the texts; shards that an earlier run finished are read again."""
    folder.mkdir(exist_ok=True)
    vectors = []
    for start in track(range(0, len(texts), size), "embedding shards"):
        shard = texts[start : start + size]
        name = hashlib.sha256(json.dumps([embedder.digest, *shard]).encode()).hexdigest()
        file = folder / f"{name[:32]}.npy"
        if not file.exists():
            partial = file.with_suffix(".partial.npy")
            np.save(partial, np.stack([embedder.embed(text) for text in shard]))
            partial.replace(file)
        vectors.append(np.load(file))
    return np.concatenate(vectors)
