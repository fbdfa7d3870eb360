"""The real embedder and cache of the project's own build folder."""

from pathlib import Path

import pytest

from serving.cache import Cache
from serving.certificate import admit
from serving.embedder import Embedder


@pytest.fixture(scope="session")
def embedder(embedded_build: Path) -> Embedder:
    return Embedder(embedded_build / "embedder")


@pytest.fixture(scope="session")
def cache(embedded_build: Path, embedder: Embedder) -> Cache:
    """With its certificate."""
    cache = Cache(embedded_build / "cache", embedder)
    assert admit(cache, embedded_build / "certificate.json") is not None, cache.uncertified
    return cache
