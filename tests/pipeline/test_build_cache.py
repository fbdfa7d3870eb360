"""The index: the same bytes from shards of any size, resumed, exhaustive or a graph; and training, reproducibly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.artifact import file_digest
from pipeline import build_cache, train_embedder, training_set
from pipeline.build_cache import build_index
from pipeline.configs import BuildCacheConfig, TrainingSetConfig, embedded
from pipeline.train_embedder import contrastive_loss
from serving.cache import Cache, Considered
from serving.embedder import Embedder
from tests.pipeline.test_certify_cache import DATA, SCHEMAS, SmallCache


@pytest.fixture
def small(tmp_path: Path, embedded_build: Path) -> SmallCache:
    return SmallCache(tmp_path, embedded_build / "embedder")


def built(small: SmallCache, name: str, config: BuildCacheConfig) -> Path:
    folder = small.root / name / "cache"
    folder.parent.mkdir()
    sources = (small.root / "entries", small.root / "contrast", DATA / "persona.yaml", DATA / "prologue.yaml", SCHEMAS)
    build_cache.run(config, *sources, small.embedder, folder)
    return folder


def test_shards_of_any_size_merge_to_the_same_bytes(small: SmallCache) -> None:
    small.write()
    digests = set()
    for size in (1, 5, 1000):
        folder = built(small, f"of-{size}", replace(small.policy, shard_texts=size))
        digests.add(file_digest(folder / "manifest.json"))
        assert len(list((folder.parent / "shards").iterdir())) == -(-26 // size)
    assert len(digests) == 1


def test_a_build_goes_on_with_the_shards_it_has(small: SmallCache, monkeypatch: pytest.MonkeyPatch) -> None:
    small.write()
    small.build()
    whole = file_digest(small.cache / "manifest.json")
    policy = replace(small.policy, shard_texts=10)
    embed, asked = Embedder.embed, []

    def cut_short(self: Embedder, text: str) -> np.ndarray:
        asked.append(text)
        if len(asked) == 15:
            raise KeyboardInterrupt
        return embed(self, text)

    monkeypatch.setattr(Embedder, "embed", cut_short)
    with pytest.raises(KeyboardInterrupt):
        built(small, "cut", policy)
    folder = small.root / "cut/cache"
    sources = (small.root / "entries", small.root / "contrast", DATA / "persona.yaml", DATA / "prologue.yaml", SCHEMAS)
    build_cache.run(policy, *sources, small.embedder, folder)
    assert len(asked) == 15 + 16  # the first ten were not asked again
    assert file_digest(folder / "manifest.json") == whole


def test_the_graph_finds_what_the_exhaustive_search_finds(small: SmallCache) -> None:
    small.write()
    flat = Cache(built(small, "flat", small.policy), Embedder(small.embedder))
    graph = Cache(built(small, "graph", replace(small.policy, flat_max=0)), Embedder(small.embedder))
    assert type(flat._index).__name__ != type(graph._index).__name__
    for question in ("Can you tell me who the Wizard of Oz is?", "What is the magic of those silver shoes?"):
        one, other = flat.consider(question), graph.consider(question)
        assert isinstance(one, Considered) and isinstance(other, Considered)
        assert (one.entry, one.phrasing, one.rival) == (other.entry, other.phrasing, other.rival)
        assert one.score == pytest.approx(other.score, abs=2**-11)  # the exhaustive index keeps half precision


def test_the_exhaustive_search_finds_the_nearest_of_all() -> None:
    random = np.random.default_rng(7)
    vectors = random.normal(size=(2000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines, rows = build_index(vectors, 10_000).search(vectors[:100], 10)
    expected = vectors[:100] @ vectors.T
    half = 2**-11  # how far rounding to half precision moves a number of 1
    assert np.abs(cosines - np.take_along_axis(expected, rows, axis=1)).max() < half
    assert np.abs(cosines - -np.sort(-expected, axis=1)[:, :10]).max() < half


def test_the_graph_has_the_same_bytes_every_time_and_misses_little() -> None:
    random = np.random.default_rng(5)
    vectors = random.normal(size=(3000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    import faiss

    one, other = (build_index(vectors, 100) for _ in range(2))
    assert np.array_equal(faiss.serialize_index(one), faiss.serialize_index(other))
    exact = build_index(vectors, 10_000).search(vectors[:200], 10)[1]
    found = one.search(vectors[:200], 10)[1]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]) > 0.95


# Training

NO_ADAPTERS = Path("no-adapters")


def training_set_of(small: SmallCache) -> Path:
    """What the embedder would learn from."""
    output = small.root / "training_set.json"
    training_set.run(TrainingSetConfig(), small.root / "entries", small.root / "contrast", SCHEMAS, output)
    return output


def test_the_embedder_learns_nothing_of_answers_and_names(small: SmallCache) -> None:
    small.write()
    before = training_set_of(small).read_bytes()
    edit(small, "the-wizard", "the-humbug")  # in an intent's name, and in its answer
    assert training_set_of(small).read_bytes() == before
    edit(small, "Who is the Wizard?", "Who is the Humbug?")
    assert training_set_of(small).read_bytes() != before


def edit(small: SmallCache, old: str, new: str) -> None:
    for file in (small.root / "entries/all.yaml", small.root / "contrast/near_misses.yaml"):
        file.write_text(file.read_text().replace(old, new))


def test_training_twice_gives_the_same_bytes(small: SmallCache) -> None:
    small.write()
    config = replace(embedded().train_embedder, steps=3, intents_per_step=3)
    folders = [small.root / name for name in ("one", "two", "other")]
    texts = training_set_of(small)
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        train_embedder.run(replace(config, seed=seed), NO_ADAPTERS, texts, folder)
    digests = [file_digest(folder / "model.safetensors") for folder in folders]
    assert digests[0] == digests[1] != digests[2]


def test_the_loss_is_that_of_the_paper() -> None:
    """Khosla et al. 2020, eq. 2, by loops in float64."""
    random = np.random.default_rng(2)
    vectors = random.normal(size=(9, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    classes, intents, temperature = [0, 0, 0, 1, 1, 2, 3, 4, 5], 3, 0.1
    losses = []
    for anchor in range(6):
        others = [row for row in range(9) if row != anchor]
        same = [row for row in others if classes[row] == classes[anchor]]
        if same:
            total = sum(np.exp(vectors[anchor] @ vectors[row] / temperature) for row in others)
            shares = [np.exp(vectors[anchor] @ vectors[row] / temperature) / total for row in same]
            losses.append(-np.mean(np.log(shares)))
    found = contrastive_loss(torch.tensor(vectors), torch.tensor(classes), intents, temperature)
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-9)


def test_training_pulls_an_intent_together_and_its_near_misses_away(small: SmallCache) -> None:
    from sentence_transformers import SentenceTransformer

    small.write()
    config = replace(embedded().train_embedder, steps=12, intents_per_step=3, learning_rate=1e-4)
    texts = training_set_of(small)
    gaps = []
    for steps, rate in ((1, 0.0), (12, config.learning_rate)):
        folder = small.root / f"after-{steps}"
        train_embedder.run(replace(config, steps=steps, learning_rate=rate), NO_ADAPTERS, texts, folder)
        model = SentenceTransformer(str(folder), device="cpu")
        own, twin, trap = model.encode(
            ["Who is the Wizard?", "the wizard of oz, who is that", "Who never was the Wizard?"],
            normalize_embeddings=True,
        )
        gaps.append(float(own @ twin - own @ trap))
    assert gaps[1] > gaps[0] + 0.1
