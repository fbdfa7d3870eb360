"""The native kernels, for every CPU family this machine runs, against references of their own in float64.

Each family's library is loaded privately, with `RTLD_LOCAL`: of those that are loaded for the process the first stays.

Shape letters: T tokens, O outputs, I inputs, N query heads, K key-value heads, H head dim, B sequences, P pages.
"""

import ctypes
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import int8_linear, kernels
from model.cpu import COMPILER_FLAGS, family, runs
from model.errors import InputError
from model.int4_linear import Int4, kernel, pack, quantize_activations
from model.kernels import KERNELS, build
from model.kv_cache import PAGE, KVCache, Place

FAMILIES = [name for name in COMPILER_FLAGS if runs(name)]
SHAPES = [(48, 128), (37, 576), (100, 1536), (5, 32)]
"""Outputs and inputs; the kernel takes outputs in sixteens and pairs of sixteens."""
SCHEMES = {"g32": 32, "channel": None}
"""Inputs that share a scale; None: all of a row."""
MOST_TOKENS = 40

x86_only = pytest.mark.skipif(kernel() != "blocks", reason="on aarch64 the int4 product is KleidiAI's")


class Native:
    """The C functions of one family's library."""

    def __init__(self, folder: Path) -> None:
        self.library = ctypes.CDLL(str(folder / KERNELS), mode=ctypes.RTLD_LOCAL)

    def int4_linear(self, x_TI: Tensor, weight: Int4) -> Tensor:
        """The product; what lies behind the result stays as it was."""
        rows = weight.planes * weight.outputs
        y = torch.full((x_TI.shape[0] * rows + 64,), torch.nan)
        sizes = (x_TI.shape[0], weight.group, weight.inputs, rows)
        self._call("emerald_int4_linear", x_TI, weight.packed, *sizes, y)
        assert y[-64:].isnan().all()
        return y[:-64].view(-1, rows)

    def int8_linear(self, x_TI: Tensor, packed: Tensor, outputs: int) -> Tensor:
        """The product; what lies behind the result stays as it was."""
        y = torch.full((x_TI.shape[0] * outputs + 64,), torch.nan)
        self._call("emerald_int8_linear", x_TI, packed, *x_TI.shape, outputs, y)
        assert y[-64:].isnan().all()
        return y[:-64].view(-1, outputs)

    def paged_attention(self, qkv: Tensor, place: Place, cache: KVCache) -> Tensor:
        """The result [T, N*H]; writes keys and values to the cache."""
        _, kv_heads, dim, _ = cache.keys.shape
        heads = qkv.shape[1] // dim - 2 * kv_heads
        out = torch.full((len(qkv) * heads * dim + 64,), torch.nan)
        sizes = (len(qkv), heads, kv_heads, dim, place.tables_BP.shape[1])
        self._call("emerald_paged_attention", qkv, *place, *cache, *sizes, out)
        assert out[-64:].isnan().all()
        return out[:-64].view(len(qkv), -1)

    def _call(self, name: str, *arguments: Tensor | int) -> None:
        assert all(one.is_contiguous() for one in arguments if isinstance(one, Tensor))
        pointers = [ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else one for one in arguments]
        getattr(self.library, name)(*(ctypes.c_int64(one) if isinstance(one, int) else one for one in pointers))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with kernels for every family."""
    folders = {name: tmp_path_factory.mktemp("kernels") for name in FAMILIES}
    for name, folder in folders.items():
        build(name, folder)
    return folders


@pytest.fixture(scope="module")
def natives(built: dict[str, Path]) -> dict[str, Native]:
    return {name: Native(folder) for name, folder in built.items()}


@pytest.fixture(params=FAMILIES)
def native(request: pytest.FixtureRequest, natives: dict[str, Native]) -> Native:
    return natives[request.param]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, until the test ends."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_this_machine_runs_a_family() -> None:
    assert FAMILIES


class Int8Token(NamedTuple):
    """A token's activations in 8 bits: x = (value - zero) / factor."""

    values: NDArray[np.float64]
    zero: int
    factor: np.float32

    @property
    def exact(self) -> NDArray[np.float64]:
        return (self.values - self.zero) / float(self.factor)


def qai8dx(x_I: NDArray[np.float32]) -> Int8Token:
    """KleidiAI's `kai_lhs_quant_pack_qai8dxp_f32`, one element at a time; Python's `round` takes ties to even."""
    f = np.float32
    low, high = min(f(0), x_I.min()), max(f(0), x_I.max())
    factor = f(1) if low == high else f(255) / (high - low)
    low, high = low * factor, high * factor
    point = f(-128) - low if (f(-128) + low) + (f(127) + high) > 0 else f(127) - high
    zero = round(float(min(max(point, f(-128)), f(127))))
    values = [min(max(round(float(x * factor)) + zero, -128), 127) for x in x_I]
    return Int8Token(np.array(values, dtype=np.float64), zero, factor)


HALVES = torch.arange(126) - 2.5
"""Half-way between two values where the range, of 255, has steps of 1."""


def almost_halves(low: float, high: float) -> Tensor:
    """A token of that range whose products with the factor are half-way between values only once they are rounded."""
    factor = np.float32(255) / np.float32(high - low)
    x = ((np.arange(-100, 100) + 0.5) / factor).astype(np.float32)
    found = x[((x * factor) % 1 == 0.5) & (x.astype(np.float64) * float(factor) % 1 != 0.5) & (x > low) & (x < high)]
    assert len(found) > 8
    return torch.nn.functional.pad(
        torch.from_numpy(np.concatenate([np.array([low, high], dtype=np.float32), found])), (0, 128)
    )[:128]


ACTIVATIONS = {
    "both-signs": random(MOST_TOKENS, 128),
    "positive": random(8, 128).abs() + 0.5,
    "negative": -random(8, 128).abs() - 0.5,
    "zeros": torch.zeros(3, 128),
    "huge": random(4, 128) * 1e30,
    "tiny": random(4, 128) * 1e-30,
    "magnitudes": random(60, 128) * torch.logspace(-6, 6, 60)[:, None],
    "one-outlier": torch.cat([random(4, 127), torch.tensor([1e4, -1e4, 1e-4, 0])[:, None]], dim=1),
    "constant": torch.full((1, 128), 0.7),
    "ties": torch.stack([torch.cat([torch.tensor([low, low + 255]), HALVES]) for low in (-100.5, -51.5, -101.0)]),
    "almost-ties": torch.stack([almost_halves(-high, high) for high in (0.75, 1.3, 2.9)]),
    "many": random(1000, 128, seed=5),
}
each_activations = pytest.mark.parametrize("x_TI", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())


@each_activations
def test_round_trip_of_activations_is_kleidiais(x_TI: Tensor) -> None:
    """`quantize_activations`, the reference of everything else, against the naive one: every bit."""
    tokens = [qai8dx(x_I) for x_I in x_TI.numpy()]
    whole_TI, factor_T1 = quantize_activations(x_TI)
    assert whole_TI.tolist() == [(token.values - token.zero).tolist() for token in tokens]
    assert factor_T1[:, 0].tolist() == [float(token.factor) for token in tokens]


@x86_only
@each_activations
def test_kernel_quantizes_activations_as_kleidiai(x_TI: Tensor, native: Native) -> None:
    """A unit matrix shows the values themselves: every bit."""
    unit = pack(torch.eye(128, dtype=torch.int8), torch.ones(128, 1), 4, "blocks")
    tokens = [qai8dx(x_I) for x_I in x_TI.numpy()]
    found = native.int4_linear(x_TI, unit).numpy()
    assert found.tolist() == np.stack([token.exact for token in tokens]).astype(np.float32).tolist()


class Matrix(NamedTuple):
    """A packed weight and the matrix that it stands for."""

    packed: Int4
    meaning: NDArray[np.float64]


def random_matrix(outputs: int, inputs: int, group: int | None, seed: int = 0) -> Matrix:
    """Every value of -8..7, and scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, generator=generator)
    scales = torch.randn(outputs, inputs // (group or inputs), generator=generator)
    scales = scales.bfloat16() if scales.shape[1] > 1 else scales
    meaning = values.double().unflatten(1, (scales.shape[1], -1)) * scales.double()[:, :, None]
    return Matrix(pack(values, scales, 4, "blocks"), meaning.flatten(1).numpy())


def assert_product(y_TO: Tensor, x_TI: Tensor, matrix: Matrix) -> None:
    """The exact product, rounded once to float32; float64's own last digit may tip one in a million."""
    expected = np.stack([matrix.meaning @ qai8dx(x_I).exact for x_I in x_TI.numpy()]).astype(np.float32)
    found = y_TO.numpy()
    assert (np.abs(found - expected) <= np.spacing(np.abs(expected))).all()
    assert (found != expected).sum() <= 1


@x86_only
@pytest.mark.parametrize("group", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_product_is_that_of_the_quantized_values(outputs: int, inputs: int, group: int | None, native: Native) -> None:
    """Of up to 40 tokens, each for itself: a token's bits do not depend on how many are in the call."""
    matrix, x_TI = random_matrix(outputs, inputs, group), random(MOST_TOKENS, inputs, seed=1)
    whole = native.int4_linear(x_TI, matrix.packed)
    assert_product(whole, x_TI, matrix)
    for tokens in range(1, MOST_TOKENS):
        first = MOST_TOKENS - tokens
        assert torch.equal(native.int4_linear(x_TI[:tokens], matrix.packed), whole[:tokens]), tokens
        assert torch.equal(native.int4_linear(x_TI[first:], matrix.packed), whole[first:]), tokens


@x86_only
@each_activations
def test_product_of_every_range_of_activations(x_TI: Tensor, native: Native) -> None:
    matrix = random_matrix(37, 128, 32)
    x_TI = x_TI[:MOST_TOKENS]
    y_TO = native.int4_linear(x_TI, matrix.packed)
    assert y_TO.isfinite().all()
    assert_product(y_TO, x_TI, matrix)


@x86_only
@pytest.mark.parametrize("group", SCHEMES.values(), ids=SCHEMES.keys())
def test_product_of_the_largest_sums(group: int | None, native: Native) -> None:
    """Llama 3.1 405B's longest rows, all -8 or 7, and all activations at one end: nothing may wrap or saturate."""
    inputs = 53248
    values = torch.full((16, inputs), -8, dtype=torch.int8)
    values[1::2] = 7
    scales = torch.ones(16, inputs // (group or inputs))
    matrix = Matrix(pack(values, scales, 4, "blocks"), values.double().numpy())
    x_TI = torch.tensor([1.0, -1.0])[:, None].expand(2, inputs).contiguous()
    assert_product(native.int4_linear(x_TI, matrix.packed), x_TI, matrix)


@x86_only
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_product_shows_what_is_not_finite(bad: float, native: Native) -> None:
    """In the token's own results: logits of a damaged artifact must not look like any others."""
    matrix, x_TI = random_matrix(37, 128, 32), random(5, 128)
    good = native.int4_linear(x_TI, matrix.packed)
    for at in (0, 77, 127):
        x_TI[3] = random(128)
        x_TI[3, at] = bad
        y_TO = native.int4_linear(x_TI, matrix.packed)
        assert not y_TO[3].isfinite().any()
        assert torch.equal(y_TO[:3], good[:3])
        assert torch.equal(y_TO[4:], good[4:])


@x86_only
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, MOST_TOKENS])
def test_product_does_not_depend_on_threads(tokens: int, native: Native, set_threads: Callable[[int], None]) -> None:
    matrix, x_TI = random_matrix(100, 576, 32), random(tokens, 576, seed=1)
    alone = native.int4_linear(x_TI, matrix.packed)
    for threads in (2, 3, 8):
        set_threads(threads)
        assert torch.equal(native.int4_linear(x_TI, matrix.packed), alone)


@x86_only
@pytest.mark.parametrize("group", SCHEMES.values(), ids=SCHEMES.keys())
def test_families_agree_on_the_product(group: int | None, natives: dict[str, Native]) -> None:
    matrix, x_TI = random_matrix(37, 576, group), random(MOST_TOKENS, 576, seed=1)
    first, *others = (native.int4_linear(x_TI, matrix.packed) for native in natives.values())
    for other in others:
        assert torch.equal(other, first)


# -------------------------------------------------------------------------------------------------------- int8 product

INT8_SHAPES = [(48, 128), (37, 384), (100, 1536), (1, 64)]


class Int8Matrix(NamedTuple):
    """A packed weight and the matrix that it stands for."""

    packed: Tensor
    meaning: NDArray[np.float64]

    @property
    def outputs(self) -> int:
        return len(self.meaning)

    def product(self, x_TI: Tensor) -> NDArray[np.float64]:
        """By the naive activations, those of each group by themselves."""
        groups = x_TI.numpy().reshape(-1, int8_linear.GROUP)
        exact = np.stack([qai8dx(group).exact for group in groups]).reshape(x_TI.shape)
        return exact @ self.meaning.T


def int8_matrix(outputs: int, inputs: int, seed: int = 0) -> Int8Matrix:
    """Values and scales that quantization gives back: a value at the end of each group's range, scales in bf16."""
    generator = torch.Generator().manual_seed(seed)
    values_OGE = torch.randint(-119, 120, (outputs, inputs // 64, 64), generator=generator)
    values_OGE[:, :, 5] = 119
    scales_OG = (torch.rand(outputs, inputs // 64, generator=generator) + 0.1).bfloat16().float()
    weight_OI = (values_OGE * scales_OG[:, :, None]).flatten(1)
    return Int8Matrix(int8_linear.pack("w", weight_OI), weight_OI.double().numpy())


def assert_near(y_TO: Tensor, expected: NDArray[np.float64]) -> None:
    """Whole numbers are exact, so only the sum over groups is rounded, and what it is multiplied by."""
    assert np.abs(y_TO.numpy() - expected).max() <= 5e-7 * np.abs(expected).max()


@pytest.mark.parametrize(("outputs", "inputs"), INT8_SHAPES)
def test_int8_product_is_that_of_the_quantized_values(outputs: int, inputs: int, native: Native) -> None:
    """Of up to 40 tokens, each for itself: a token's bits do not depend on how many are in the call."""
    matrix, x_TI = int8_matrix(outputs, inputs), random(MOST_TOKENS, inputs, seed=1)
    whole = native.int8_linear(x_TI, matrix.packed, outputs)
    assert_near(whole, matrix.product(x_TI))
    for tokens in range(1, MOST_TOKENS):
        first = MOST_TOKENS - tokens
        assert torch.equal(native.int8_linear(x_TI[:tokens], matrix.packed, outputs), whole[:tokens]), tokens
        assert torch.equal(native.int8_linear(x_TI[first:], matrix.packed, outputs), whole[first:]), tokens


@each_activations
def test_int8_product_of_every_range_of_activations(x_TI: Tensor, native: Native) -> None:
    matrix = int8_matrix(37, 128)
    y_TO = native.int8_linear(x_TI, matrix.packed, matrix.outputs)
    expected = matrix.product(x_TI)
    assert np.isfinite(expected).all()
    assert (np.abs(y_TO.numpy() - expected) <= 1e-6 * np.abs(expected).max(axis=1, keepdims=True)).all()


def test_int8_product_of_the_largest_sums(native: Native) -> None:
    """All weights and all activations at one end or the other: nothing may wrap or saturate."""
    weight_OI = torch.full((16, 1536), 119.0)
    weight_OI[1::2] = -119
    matrix = Int8Matrix(int8_linear.pack("w", weight_OI), weight_OI.double().numpy())
    x_TI = torch.tensor([1.0, -1.0])[:, None].expand(2, 1536).contiguous()
    assert_near(native.int8_linear(x_TI, matrix.packed, 16), matrix.product(x_TI))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_product_shows_what_is_not_finite(bad: float, native: Native) -> None:
    matrix, x_TI = int8_matrix(37, 128), random(5, 128)
    good = native.int8_linear(x_TI, matrix.packed, 37)
    for at in (0, 77, 127):
        x_TI[3] = random(128)
        x_TI[3, at] = bad
        y_TO = native.int8_linear(x_TI, matrix.packed, 37)
        assert not y_TO[3].isfinite().any()
        assert torch.equal(y_TO[:3], good[:3])
        assert torch.equal(y_TO[4:], good[4:])


def test_families_agree_on_the_int8_product(natives: dict[str, Native]) -> None:
    matrix, x_TI = int8_matrix(37, 384), random(MOST_TOKENS, 384, seed=1)
    first, *others = (native.int8_linear(x_TI, matrix.packed, 37) for native in natives.values())
    for other in others:
        assert torch.equal(other, first)


# ----------------------------------------------------------------------------------------------------------- attention

HEADS = [(4, 4, 32), (9, 3, 64), (4, 1, 128), (16, 2, 64), (32, 2, 32), (6, 2, 96)]
"""Query heads, key-value heads, head dim: 1, 3, 4, 8, 16 and 3 queries share a key-value head."""
each_heads = pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
PAGES = 48


class Sequences(NamedTuple):
    """Tokens of some sequences before their step: row b continues at `starts[b]` on the pages `tables[b]`."""

    rotary: Tensor
    tables: Tensor
    cache: KVCache
    starts: list[int]
    qkv: list[Tensor]


def rotary_table(positions: int, dim: int) -> Tensor:
    angles = torch.arange(positions)[:, None] * 3.7 ** -torch.arange(dim // 2).double()
    return torch.stack([angles.cos(), angles.sin()], dim=1).repeat(1, 1, 2).float()


def empty_cache(kv_heads: int, dim: int, value: float = 0) -> KVCache:
    shapes = (PAGES, kv_heads, dim, PAGE), (PAGES, kv_heads, PAGE, dim)
    return KVCache(*(torch.full(shape, value, dtype=torch.bfloat16) for shape in shapes))


def copy(cache: KVCache) -> KVCache:
    return KVCache(*(tensor.clone() for tensor in cache))


def assert_same_bits(cache: KVCache, other: KVCache) -> None:
    for one, another in zip(cache, other, strict=True):
        assert torch.equal(one.view(torch.int16), another.view(torch.int16))


def sequences(heads: int, kv_heads: int, dim: int, starts: list[int], counts: list[int], seed: int = 0) -> Sequences:
    """Random ones on permuted pages; the cache is random everywhere, in slots that nothing wrote too."""
    generator = torch.Generator().manual_seed(seed)
    widths = [-(-(start + count) // PAGE) for start, count in zip(starts, counts, strict=True)]
    order = iter(torch.randperm(PAGES, generator=generator).int())
    rows = [torch.stack([next(order) for _ in range(width)]) for width in widths]
    tables = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    cache = KVCache(*(torch.randn(part.shape, generator=generator).bfloat16() for part in empty_cache(kv_heads, dim)))
    qkv = [torch.randn(count, (heads + 2 * kv_heads) * dim, generator=generator) for count in counts]
    return Sequences(rotary_table(16 * PAGES, dim), tables, cache, starts, qkv)


def step(native: Native, all_of: Sequences, cache: KVCache, chosen: list[tuple[int, int, int]]) -> list[Tensor]:
    """One call with the tokens `first`..`last` of each chosen row; returns each row's part of the result."""
    spans = [(row, all_of.starts[row] + first, last - first) for row, first, last in chosen]
    positions = torch.cat([torch.arange(at, at + count) for _, at, count in spans])
    rows = torch.tensor([row for row, _, count in spans for _ in range(count)])
    qkv = torch.cat([all_of.qkv[row][first:last] for row, first, last in chosen])
    out = native.paged_attention(qkv, Place(all_of.rotary, positions, rows, all_of.tables), cache)
    return list(out.split([count for _, _, count in spans]))


def whole_step(native: Native, all_of: Sequences, cache: KVCache) -> list[Tensor]:
    return step(native, all_of, cache, [(row, 0, len(qkv)) for row, qkv in enumerate(all_of.qkv)])


def turned(x_H: NDArray[np.float32], rotary_2H: Tensor) -> NDArray[np.float32]:
    """Half-split rotary embedding; each product and each sum rounded."""
    first, second = np.split(x_H, 2)
    cos, sin = rotary_2H.numpy()[:, : len(first)]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])


def attention_reference(all_of: Sequences, cache: KVCache, row: int, token: int) -> NDArray[np.float64]:
    """One token's result from the keys and values that the cache holds after the step, head by head, slot by slot."""
    _, kv_heads, dim, _ = cache.keys.shape
    position = all_of.starts[row] + token
    q_NH = all_of.qkv[row][token].numpy().reshape(-1, dim)[: -2 * kv_heads]
    slots = [(int(all_of.tables[row, at // PAGE]), at % PAGE) for at in range(position + 1)]
    k_SKH = np.stack([cache.keys[page, :, :, slot].double().numpy() for page, slot in slots])
    v_SKH = np.stack([cache.values[page, :, slot].double().numpy() for page, slot in slots])
    heads = []
    for index, q_H in enumerate(q_NH):
        shared = index // (len(q_NH) // kv_heads)
        scores_S = k_SKH[:, shared] @ turned(q_H, all_of.rotary[position]).astype(np.float64) / np.sqrt(dim)
        weights_S = np.exp(scores_S - scores_S.max())
        heads.append(weights_S @ v_SKH[:, shared] / weights_S.sum())
    return np.concatenate(heads)


def assert_attention(out: list[Tensor], all_of: Sequences, cache: KVCache, atol: float = 2e-6) -> None:
    """On x86-64 the exact result, rounded once."""
    for row, out_TX in enumerate(out):
        expected = np.stack([attention_reference(all_of, cache, row, token) for token in range(len(out_TX))])
        found = out_TX.numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
        if kernel() == "blocks":
            assert (np.abs(found - expected) <= np.spacing(np.abs(found))).all()
            assert (found != expected.astype(np.float32)).mean() < 1e-3


STEPS = {
    "prompt": ([0], [75]),
    "one-token": ([0], [1]),
    "mid-page": ([37], [30]),
    "decode": ([600], [1]),
    "batch": ([0, 20, 21, 31, 130, 64], [20, 1, 3, 1, 1, 16]),  # positions of the first three continue each other
}


@each_heads
@pytest.mark.parametrize(("starts", "counts"), STEPS.values(), ids=STEPS.keys())
def test_attention_is_that_of_the_definition(
    heads: int, kv_heads: int, dim: int, starts: list[int], counts: list[int], native: Native
) -> None:
    all_of = sequences(heads, kv_heads, dim, starts, counts)
    cache = copy(all_of.cache)
    assert_attention(whole_step(native, all_of, cache), all_of, cache)


def test_attention_with_far_scores(native: Native) -> None:
    """Scores hundreds apart: nearly all weight is on one key, and the exponentials of the others underflow."""
    all_of = sequences(9, 3, 64, [50], [20])
    (qkv,) = all_of.qkv
    qkv[:, : 9 * 64] *= 50
    cache = copy(all_of.cache)
    assert_attention(whole_step(native, all_of, cache), all_of, cache, atol=2e-4)


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_attention_shows_what_is_not_finite(part: str, native: Native) -> None:
    """To the tokens that see it, and to no other sequence."""
    all_of = sequences(3, 3, 32, [20, 20], [4, 4])
    good = whole_step(native, all_of, copy(all_of.cache))
    at = {"query": 0, "key": 3 * 32, "value": 6 * 32}[part]
    all_of.qkv[0][2, at : at + 32] = torch.nan
    first, second = whole_step(native, all_of, copy(all_of.cache))
    assert not first[2, :32].isfinite().any()
    assert part == "query" or not first[3, :32].isfinite().any()
    assert torch.equal(second, good[1])


def test_first_token_gets_its_own_value(native: Native) -> None:
    all_of = sequences(9, 3, 64, [0], [1])
    (out,) = whole_step(native, all_of, copy(all_of.cache))
    values = all_of.qkv[0][0, -3 * 64 :].bfloat16().float().view(3, 1, 64).expand(3, 3, 64)
    assert torch.equal(out.view(3, 3, 64), values)


def written_slots(all_of: Sequences) -> Iterator[tuple[int, int, int, int, int]]:
    """Row, token, position, page and slot of every token of the step."""
    for row, (start, qkv) in enumerate(zip(all_of.starts, all_of.qkv, strict=True)):
        for token in range(len(qkv)):
            at = start + token
            yield row, token, at, int(all_of.tables[row, at // PAGE]), at % PAGE


@each_heads
def test_keys_and_values_are_rounded_into_their_slots(heads: int, kv_heads: int, dim: int, native: Native) -> None:
    """To the nearest bf16, and nothing else in the cache changes."""
    all_of = sequences(heads, kv_heads, dim, *STEPS["batch"])
    before, cache = all_of.cache, copy(all_of.cache)
    whole_step(native, all_of, cache)
    for row, token, at, page, slot in written_slots(all_of):
        _, k_KH, v_KH = all_of.qkv[row][token].view(-1, dim).split([heads, kv_heads, kv_heads])
        assert torch.equal(cache.values[page, :, slot], v_KH.bfloat16())
        keys_KH = torch.from_numpy(np.stack([turned(k_H.numpy(), all_of.rotary[at]) for k_H in k_KH]))
        assert torch.equal(cache.keys[page, :, :, slot], keys_KH.bfloat16())
        before.keys[page, :, :, slot] = cache.keys[page, :, :, slot]
        before.values[page, :, slot] = v_KH.bfloat16()
    assert_same_bits(before, cache)


def test_ties_are_rounded_to_even(native: Native) -> None:
    """Half-way between two bf16, above and below zero, and next to half-way; unturned, so that keys are exact too."""
    all_of = sequences(1, 1, 32, [3], [1])
    unturned = torch.tensor([1.0, 0.0])[None, :, None].expand(all_of.rotary.shape[0], 2, 32).contiguous()
    halves = 1 + torch.arange(1, 16, 2) * 2.0**-8
    x_H = torch.cat([halves, -halves, halves + 2.0**-20, halves[:5] - 2.0**-20, torch.tensor([0.0, 3e38, 1e-40])])
    all_of = all_of._replace(rotary=unturned, qkv=[x_H.repeat(3)[None]])
    cache = copy(all_of.cache)
    whole_step(native, all_of, cache)
    page = int(all_of.tables[0, 0])
    assert torch.equal(cache.keys[page, 0, :, 3], x_H.bfloat16())
    assert torch.equal(cache.values[page, 0, 3], x_H.bfloat16())


@each_heads
def test_what_is_not_in_the_sequence_is_never_seen(heads: int, kv_heads: int, dim: int, native: Native) -> None:
    """Later slots of a page, pages of others: whatever they hold, a prompt in pieces comes out the same."""
    results = []
    for garbage in (0.0, 1e30, torch.nan):
        all_of = sequences(heads, kv_heads, dim, [0, 0], [37, 20])
        cache = empty_cache(kv_heads, dim, garbage)
        first = step(native, all_of, cache, [(0, 0, 21), (1, 0, 1)])
        second = step(native, all_of, cache, [(1, 1, 20), (0, 21, 37)])
        results.append(torch.cat([*first, *second]))
    assert results[0].isfinite().all()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@each_heads
def test_prompt_in_pieces_is_the_whole_prompt(heads: int, kv_heads: int, dim: int, native: Native) -> None:
    """Every bit of the result and of the cache."""
    all_of = sequences(heads, kv_heads, dim, [5], [90])
    whole_cache, cache = copy(all_of.cache), copy(all_of.cache)
    (whole,) = whole_step(native, all_of, whole_cache)
    ends = accumulate([17, 1, 1, 40, 2, 16, 13], initial=0)
    pieces = [step(native, all_of, cache, [(0, first, last)])[0] for first, last in pairwise(ends)]
    assert torch.equal(torch.cat(pieces), whole)
    assert_same_bits(cache, whole_cache)


@each_heads
def test_sequence_in_a_batch_is_the_sequence_alone(heads: int, kv_heads: int, dim: int, native: Native) -> None:
    """Every bit, in two orders of the sequences, and with all tokens in reverse."""
    all_of = sequences(heads, kv_heads, dim, *STEPS["batch"])
    chosen = [(row, 0, len(qkv)) for row, qkv in enumerate(all_of.qkv)]
    together = step(native, all_of, copy(all_of.cache), chosen)
    backwards = step(native, all_of, copy(all_of.cache), chosen[::-1])[::-1]
    single = [(row, token, token + 1) for row, _, count in chosen for token in range(count)][::-1]
    singly = dict(zip(single, step(native, all_of, copy(all_of.cache), single), strict=True))
    for row, one in enumerate(chosen):
        (alone,) = step(native, all_of, copy(all_of.cache), [one])
        assert torch.equal(alone, together[row])
        assert torch.equal(alone, backwards[row])
        assert torch.equal(alone, torch.cat([singly[row, token, token + 1] for token in range(len(alone))]))


@each_heads
@pytest.mark.parametrize(("starts", "counts"), STEPS.values(), ids=STEPS.keys())
def test_attention_does_not_depend_on_threads(
    heads: int,
    kv_heads: int,
    dim: int,
    starts: list[int],
    counts: list[int],
    native: Native,
    set_threads: Callable[[int], None],
) -> None:
    all_of = sequences(heads, kv_heads, dim, starts, counts)
    alone = whole_step(native, all_of, copy(all_of.cache))
    for threads in (2, 3, 8):
        set_threads(threads)
        for one, other in zip(alone, whole_step(native, all_of, copy(all_of.cache)), strict=True):
            assert torch.equal(one, other)


@each_heads
def test_families_agree_on_attention(heads: int, kv_heads: int, dim: int, natives: dict[str, Native]) -> None:
    all_of = sequences(heads, kv_heads, dim, *STEPS["batch"])
    results = []
    for native in natives.values():
        cache = copy(all_of.cache)
        results.append((torch.cat(whole_step(native, all_of, cache)), cache))
    (first, first_cache), *others = results
    for other, cache in others:
        assert torch.equal(other, first)
        assert_same_bits(cache, first_cache)


def test_kernels_follow_torchs_threads(
    native: Native, built: dict[str, Path], set_threads: Callable[[int], None]
) -> None:
    """They are parallel, and share torch's OpenMP, so that `torch.set_num_threads` counts for them."""
    assert all(b"GOMP_parallel" in (folder / KERNELS).read_bytes() for folder in built.values())
    for threads in (3, 1):
        set_threads(threads)
        assert native.library.omp_get_max_threads() == threads


@pytest.mark.usefixtures("kernels")
def test_attention_operator_is_the_kernel(natives: dict[str, Native]) -> None:
    all_of = sequences(9, 3, 64, [37], [30])
    place = Place(all_of.rotary, torch.arange(37, 67), torch.zeros(30, dtype=torch.int64), all_of.tables)
    cache, other = copy(all_of.cache), copy(all_of.cache)
    (qkv,) = all_of.qkv
    expected = natives[family()].paged_attention(qkv, place, cache)
    found = torch.ops.emerald.paged_attention(qkv.T.contiguous().T, *place, *other)  # the operator makes it contiguous
    assert torch.equal(found, expected)
    assert_same_bits(cache, other)


@x86_only
@pytest.mark.usefixtures("kernels")
def test_int4_operator_is_the_kernel(natives: dict[str, Native]) -> None:
    weight, x_TI = random_matrix(37, 128, 32).packed, random(5, 128)
    found = torch.ops.emerald.int4_linear(x_TI.T.contiguous().T, weight.packed, 32, 128, 37)
    assert torch.equal(found, natives[family()].int4_linear(x_TI, weight))


@pytest.mark.usefixtures("kernels")
def test_int8_operator_is_the_kernel(natives: dict[str, Native]) -> None:
    matrix, x_TI = int8_matrix(37, 128), random(5, 128)
    found = int8_linear.linear(x_TI.T.contiguous().T, matrix.packed, 37)
    assert torch.equal(found, natives[family()].int8_linear(x_TI, matrix.packed, 37))


@pytest.mark.usefixtures("kernels")
def test_operators_declare_what_they_do() -> None:
    """Of what shape the result is, and which arguments they write to: what `torch.export` goes by."""
    tests = ("test_schema", "test_faketensor")
    all_of = sequences(9, 3, 64, [37], [30])
    place = Place(all_of.rotary, torch.arange(37, 67), torch.zeros(30, dtype=torch.int64), all_of.tables)
    attention = torch.ops.emerald.paged_attention.default
    torch.library.opcheck(attention, (all_of.qkv[0], *place, *all_of.cache), test_utils=tests)
    product = (random(5, 128), int8_matrix(37, 128).packed, 37)
    torch.library.opcheck(torch.ops.emerald.int8_linear.default, product, test_utils=tests)
    if kernel() == "blocks":
        weight = random_matrix(37, 128, 32).packed
        arguments = (random(5, 128), weight.packed, 32, 128, 37)
        torch.library.opcheck(torch.ops.emerald.int4_linear.default, arguments, test_utils=tests)


@pytest.mark.usefixtures("kernels")
def test_kernels_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another folder's programs call would be the first one's, silently."""
    other = tmp_path / "kernels.cpp"
    other.write_text(kernels.SOURCE.read_text() + "// changed\n")
    monkeypatch.setattr(kernels, "SOURCE", other)
    build(family(), tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}: its kernels are of another version .* run export export_embed"):
        kernels.load(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF"], ids=["missing", "empty", "cut short"])
def test_kernels_that_are_no_library_are_named(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / KERNELS).write_bytes(content)
    with pytest.raises(InputError, match=rf"{tmp_path}: .*{KERNELS}.*: run .* export export_embedder"):
        kernels.load(tmp_path)


def test_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"no C\+\+ compiler 'no-such-compiler': install g\+\+ .*or set CXX"):
        build(FAMILIES[0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_family_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="no kernel for the CPU family 'riscv64'; there are some for x86-64-v4"
    ) as raised:
        build("riscv64", tmp_path)
    assert all(name in str(raised.value) for name in COMPILER_FLAGS)


def test_failed_compilation_shows_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(InputError, match=r"^/bin/false .*kernels\.cpp.* failed:"):
        build(FAMILIES[0], tmp_path)
