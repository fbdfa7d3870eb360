from pathlib import Path

import pytest
import torch

from model.shards import read_shards, shard_files, write_shards


def test_tensors_are_split_by_size_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.shards.SHARD_BYTES", 100)
    tensors = {name: torch.full((10,), float(index)) for index, name in enumerate("abcde")}  # 40 bytes each
    tensors["large"] = torch.arange(100.0)
    file_of = write_shards(iter(tensors.items()), tmp_path)
    expected = {"a": 1, "b": 1, "c": 2, "d": 2, "e": 3, "large": 4}
    assert file_of == {name: f"weights-0000{index}.safetensors" for name, index in expected.items()}
    assert [path.name for path in shard_files(tmp_path)] == sorted(set(file_of.values()))
    found = read_shards(tmp_path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    write_shards(iter([("transposed", table.T), ("row", table[1])]), tmp_path)
    found = read_shards(tmp_path)
    assert torch.equal(found["transposed"], table.T)
    assert torch.equal(found["row"], table[1])
