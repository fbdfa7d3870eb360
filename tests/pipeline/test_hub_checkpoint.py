"""Weights that stay on the hub: the int4 that a folder gives, one shard on the disk, and every fault of a hub said."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

import pipeline.hub_checkpoint
from model.artifact import file_digest, files_below
from model.checkpoint import EVERY, INDEX, read_tensor
from tests.conftest import TINY
from tests.hub import GATED, GRANTED, OPEN, REFUSED, REVISION, Hub, serving
from tests.pipeline.conftest import SHARDS, Run, from_folder, write_sharded_model

SECOND, THIRD = (f"model-{number:05d}-of-{SHARDS:05d}.safetensors" for number in (2, 3))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(write_sharded_model(tmp_path / "served", replace(TINY, layers=4))) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what is lost when a connection breaks
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def streamed(build: Path, repository: str = OPEN) -> list[str]:
    source = ["--set", f"fetch.source=hub:{repository}@{REVISION}", "--set", "fetch.streamed=true"]
    others = ("fetch.sha256=none", "tune.steps=0", "quantize.method=search")
    return ["--build", str(build), *source, *(part for one in others for part in ("--set", one))]


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file but the manifest, which names the source."""
    names = [name for name in files_below(folder) if name.name != "manifest.json"]
    return {str(name): file_digest(folder / name) for name in names}


def test_streamed_is_what_a_folder_gives_and_holds_one_shard(
    hub: Hub, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0

    def watching(file: Path, name: str, rows: slice = EVERY) -> Tensor:
        nonlocal most
        most = max(most, len(list((tmp_path / "a/.hub").glob("*/*.safetensors"))))
        return read_tensor(file, name, rows)

    monkeypatch.setattr(pipeline.hub_checkpoint, "read_tensor", watching)
    assert run("run", "quantize", *streamed(tmp_path / "a")).code == 0
    assert run("run", "quantize", "--build", tmp_path / "b", *from_folder(hub.folder)).code == 0
    assert contents(tmp_path / "a/int4") == contents(tmp_path / "b/int4")
    assert not list((tmp_path / "a/checkpoint").glob("*.safetensors"))
    assert most == 1
    assert not (tmp_path / "a/.hub").exists()
    assert hub.sent == {file.name: file.stat().st_size for file in hub.folder.iterdir() if hub.sent[file.name]}
    assert sum(file.endswith(".safetensors") for file in hub.sent) == SHARDS


def require_same(hub: Hub, tmp_path: Path, run: Run) -> None:
    """A streamed run succeeds, and gives what the folder gives."""
    assert run("run", "quantize", *streamed(tmp_path / "a")).code == 0
    assert run("run", "quantize", "--build", tmp_path / "b", *from_folder(hub.folder)).code == 0
    assert contents(tmp_path / "a/int4") == contents(tmp_path / "b/int4")


def test_cut_connection_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path, run: Run) -> None:
    size = (hub.folder / SECOND).stat().st_size
    hub.cuts[SECOND] = [size // 3, size // 3]
    require_same(hub, tmp_path, run)
    assert hub.cuts[SECOND] == []
    assert size <= hub.sent[SECOND] <= size + 2 * 4096


def test_download_that_was_given_up_is_taken_up_by_the_next_run(
    hub: Hub, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.shards.SHARD_BYTES", 1)  # nothing of the first shard is needed again
    size = (hub.folder / SECOND).stat().st_size
    hub.cuts[SECOND] = [size // 2, *[0] * 5]
    ended = run("run", "quantize", *streamed(tmp_path / "a"))
    assert ended.code == 2
    assert f"the hub at {hub.url} cannot be reached" in ended.err
    assert hub.cuts[SECOND] == []
    require_same(hub, tmp_path, run)
    assert size <= hub.sent[SECOND] <= size + 4096


def test_server_that_ignores_ranges(hub: Hub, tmp_path: Path, run: Run) -> None:
    size = (hub.folder / SECOND).stat().st_size
    hub.cuts[SECOND], hub.ranges = [size // 3], False
    require_same(hub, tmp_path, run)
    assert hub.sent[SECOND] == size // 3 + size


def test_throttled(hub: Hub, tmp_path: Path, run: Run) -> None:
    hub.throttled[SECOND] = 2
    require_same(hub, tmp_path, run)
    assert hub.throttled[SECOND] == 0


def test_hub_without_redirects(hub: Hub, tmp_path: Path, run: Run) -> None:
    hub.redirects = False
    require_same(hub, tmp_path, run)


def test_damage_on_the_way_is_noticed_and_the_next_run_mends_it(hub: Hub, tmp_path: Path, run: Run) -> None:
    hub.flipped = {SECOND}
    ended = run("run", "quantize", *streamed(tmp_path / "a"))
    assert ended.code == 2
    assert f"{SECOND} came as" in ended.err
    assert "damaged on the way; run again" in ended.err
    hub.flipped = set()
    require_same(hub, tmp_path, run)


def test_shard_that_changes_during_the_run(hub: Hub, tmp_path: Path, run: Run) -> None:
    assert run("run", "fetch", *streamed(tmp_path / "a")).code == 0
    tensors = load_file(hub.folder / SECOND)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, hub.folder / SECOND, {"format": "pt"})
    ended = run("run", "quantize", *streamed(tmp_path / "a"))
    assert ended.code == 2
    assert f"{SECOND} has changed since it was fetched" in ended.err
    assert "run fetch --force" in ended.err


def test_etag_that_is_no_digest(hub: Hub, tmp_path: Path, run: Run) -> None:
    hub.etags[SECOND] = "W/42"
    ended = run("run", "fetch", *streamed(tmp_path / "a"))
    assert ended.code == 2
    assert f"the hub states no size and SHA-256 of {SECOND}" in ended.err
    assert "use folder:PATH" in ended.err


def test_etag_of_other_content(hub: Hub, tmp_path: Path, run: Run) -> None:
    hub.etags[SECOND] = "0" * 64
    ended = run("run", "quantize", *streamed(tmp_path / "a"))
    assert ended.code == 2
    assert f"{SECOND} came as" in ended.err
    assert "0" * 64 in ended.err


def test_token_that_expires_during_the_run(hub: Hub, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", GRANTED)
    monkeypatch.setattr("model.shards.SHARD_BYTES", 1 << 16)
    assert run("run", "fetch", *streamed(tmp_path / "a", GATED)).code == 0
    hub.expires_at = THIRD
    ended = run("run", "quantize", *streamed(tmp_path / "a", GATED))
    assert ended.code == 2
    assert "the hub refused the token; it may have expired" in ended.err
    assert f"create one at {hub.url}/settings/tokens" in ended.err
    assert GRANTED not in ended.err
    before = dict(hub.sent)
    hub.expired, hub.expires_at = False, ""
    ended = run("run", "quantize", *streamed(tmp_path / "a", GATED))
    assert ended.states == {"fetch": "unchanged", "tune": "unchanged", "quantize": "ran"}
    assert "going on where the last run ended" in ended.err
    assert {file for file, sent in hub.sent.items() if sent != before.get(file)} <= {SECOND, THIRD}
    assert run("run", "quantize", "--build", tmp_path / "b", *from_folder(hub.folder)).code == 0
    assert contents(tmp_path / "a/int4") == contents(tmp_path / "b/int4")


@pytest.mark.parametrize("token", [None, REFUSED], ids=["no token", "not granted"])
def test_gated_model_says_so_before_anything_is_downloaded(
    hub: Hub, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    ended = run("run", "fetch", *streamed(tmp_path / "a", GATED))
    assert ended.code == 2
    assert f"{GATED} is gated" in ended.err
    assert f"ask for access at {hub.url}/{GATED}" in ended.err


def test_weights_in_one_file_are_not_streamed(hub: Hub, tmp_path: Path, run: Run) -> None:
    (hub.folder / INDEX).unlink()
    ended = run("run", "fetch", *streamed(tmp_path / "a"))
    assert ended.code == 2
    assert "set fetch.streamed=false" in ended.err


def test_other_network_is_refused_by_its_names(hub: Hub, tmp_path: Path, run: Run) -> None:
    index = json.loads((hub.folder / INDEX).read_text())
    index["weight_map"]["model.layers.0.self_attn.q_proj.bias"] = SECOND
    (hub.folder / INDEX).write_text(json.dumps(index))
    ended = run("run", "fetch", *streamed(tmp_path / "a"))
    assert ended.code == 2
    assert "Llama has no biases" in ended.err
    assert not hub.sent[SECOND]
