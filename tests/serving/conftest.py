"""The real embedder, cache and engine, brought up to date in the project's own build folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from serving.cache import Cache
from serving.embedder import Embedder
from tests.conftest import ROOT

BUILD = ROOT / "build/embedded"


@pytest.fixture(scope="session")
def embedded_build() -> Path:
    """build/embedded with engine, embedder and cache; only what is out of date is built."""
    subprocess.run([sys.executable, "-m", "pipeline", "run", "export", "build_cache"], cwd=ROOT, check=True)
    return BUILD


@pytest.fixture(scope="session")
def embedder(embedded_build: Path) -> Embedder:
    return Embedder(embedded_build / "embedder")


@pytest.fixture(scope="session")
def cache(embedded_build: Path, embedder: Embedder) -> Cache:
    return Cache(embedded_build / "cache", embedder)
