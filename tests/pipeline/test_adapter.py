"""An adapter: what training changed, kept small; against numpy's own decomposition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.errors import InputError
from pipeline.adapter import Adapter

TRAINED_ON = {"training set": "abc", "procedure": "1"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base() -> dict[str, Tensor]:
    return {"layer.weight": random(12, 8), "layer.bias": random(12, seed=1), "table": random(5, 8, seed=2)}


@pytest.fixture
def trained(base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything but the table has changed."""
    change = 0.01 * random(12, 8, seed=3)
    return {**base, "layer.weight": base["layer.weight"] + change, "layer.bias": base["layer.bias"] + 0.5}


def change_of(adapter: Adapter, base: dict[str, Tensor], name: str = "layer.weight") -> Tensor:
    return adapter.merged(base)[name] - base[name]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_change_is_the_nearest_of_its_rank(base: dict[str, Tensor], trained: dict[str, Tensor], rank: int) -> None:
    adapter = Adapter.between(base, trained, rank, TRAINED_ON)
    change = (trained["layer.weight"] - base["layer.weight"]).double().numpy()
    left, values, right = np.linalg.svd(change)
    nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
    found = change_of(adapter, base).double().numpy()
    assert np.abs(found - nearest).max() <= 2**-7 * np.abs(change).max()  # two factors, each rounded to 8 bits
    assert np.linalg.matrix_rank(found, tol=1e-4) == rank


def test_vectors_are_kept_whole_and_what_stood_still_is_left_out(
    base: dict[str, Tensor], trained: dict[str, Tensor]
) -> None:
    adapter = Adapter.between(base, trained, 2, TRAINED_ON)
    merged = adapter.merged(base)
    torch.testing.assert_close(merged["layer.bias"], trained["layer.bias"])
    assert torch.equal(merged["table"], base["table"])
    assert not [name for name in adapter.tensors if name.startswith("table")]


def test_what_is_read_gives_the_same_model_to_the_bit(
    base: dict[str, Tensor], trained: dict[str, Tensor], tmp_path: Path
) -> None:
    adapter = Adapter.between(base, trained, 2, TRAINED_ON)
    adapter.write(tmp_path / "adapter.safetensors")
    read = Adapter.read(tmp_path / "adapter.safetensors")
    assert read.trained_on == TRAINED_ON
    assert all(torch.equal(tensor, adapter.merged(base)[name]) for name, tensor in read.merged(base).items())


def test_a_flipped_byte_a_cut_file_and_another_file_are_refused(
    base: dict[str, Tensor], trained: dict[str, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "adapter.safetensors"
    Adapter.between(base, trained, 2, TRAINED_ON).write(file)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for content, words in ((flipped, "damaged"), (whole[:-9], "no adapter that can be read"), (b"", "no adapter")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=f"{words}.*restore it from git, or delete it to train anew"):
            Adapter.read(file)


def test_an_adapter_that_claims_other_data_is_refused(
    base: dict[str, Tensor], trained: dict[str, Tensor], tmp_path: Path
) -> None:
    """The header is under the digest, too."""
    file = tmp_path / "adapter.safetensors"
    Adapter.between(base, trained, 2, TRAINED_ON).write(file)
    file.write_bytes(file.read_bytes().replace(b'\\"abc\\"', b'\\"abd\\"'))
    with pytest.raises(InputError, match="damaged"):
        Adapter.read(file)


def test_the_file_has_the_same_bytes_every_time(
    base: dict[str, Tensor], trained: dict[str, Tensor], tmp_path: Path
) -> None:
    """Whatever seed a library's hash tables have at the moment."""
    adapter = Adapter.between(base, trained, 3, TRAINED_ON)
    files = [tmp_path / str(number) for number in range(12)]
    for file in files:
        adapter.write(file)
    assert len({file.read_bytes() for file in files}) == 1
