"""A build folder with a handful of ready answers, exported on the CPU at work, as a tar on standard output.

    tests/arm64/run.sh max python3 -m tests.image.small_build build/embedded >build/arm64/small-build.tar

The int4 weights and the trained embedder come from a finished build, whatever machine made it; what depends on the CPU
is made here: the engine, the compiled embedder and the index. No one certifies so few answers, so the certificate is
void and the server answers exact matches only.
"""

import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import yaml

from model.errors import InputError
from pipeline import build_cache, export, export_embedder
from pipeline.configs import embedded
from serving.cache import Cache
from serving.certificate import sealed, write_certificate
from serving.embedder import Embedder
from tests.conftest import ROOT

DATA = ROOT / "cache_data"
ENTRIES, PHRASINGS, CONTRAST = 1, 8, 1
"""As few as the schema allows: each of their texts is embedded on the emulated CPU."""


def main(made: Path) -> None:
    """Writes the folder somewhere, and then as a tar."""
    for name in ("int4", "trained"):
        if not (made / name).is_dir():
            raise InputError(f"no {made / name}: run make pipeline")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build = folder / "build"
        build.mkdir()
        export_embedder.run(embedded().export_embedder, made / "trained", build / "embedder")
        _build_cache(folder, build)
        export.run(embedded().export, made / "int4", build / "engine")
        reports = build / "reports"
        reports.mkdir()
        shutil.copyfile(made / "reports/quality.json", reports / "quality.json")
        with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
            archive.add(build, ".")


def _build_cache(folder: Path, build: Path) -> None:
    entries = [{**row, "phrasings": row["phrasings"][:PHRASINGS]} for row in _rows("entries/app.yaml")[:ENTRIES]]
    ids = {entry["id"] for entry in entries}
    near = [row for row in _rows("contrast/near_misses.yaml") if row["near"] in ids][:CONTRAST]
    elsewhere = _rows("contrast/out_of_domain.yaml")[:CONTRAST]
    for name, rows in (("entries/few", entries), ("contrast/near_misses", near), ("contrast/out_of_domain", elsewhere)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(rows, allow_unicode=True), encoding="utf-8")
    persona, prologue, schema = (DATA / name for name in ("persona.yaml", "prologue.yaml", "schema"))
    few = (folder / "entries", folder / "contrast", persona, prologue, schema)
    build_cache.run(embedded().build_cache, *few, build / "embedder", build / "cache")
    shutil.rmtree(build / "shards")
    cache = Cache(build / "cache", Embedder(build / "embedder"))
    void = {"certified": False, "reason": "a handful of answers, for a test", "sealed": sealed(cache)}
    write_certificate(build / "certificate.json", void)


def _rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = yaml.safe_load((DATA / name).read_text(encoding="utf-8"))
    return rows


if __name__ == "__main__":
    main(Path(sys.argv[1]))
