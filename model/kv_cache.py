"""Keys and values of earlier tokens, in pages of 16 slots that sequences share where their tokens begin alike.

A sequence holds a list of pages. A full page is known by the tokens that led to it, so a prompt that begins like an
earlier one (the persona, the conversation so far) takes that one's pages instead of computing them again. Pages that no
sequence holds stay known until their room is needed, the longest unused first. The idea is vLLM's (Kwon et al. 2023).

Shape letters: T tokens, C positions of the context, B sequences, P pages of a sequence, K key-value heads, H head dim,
S slots of a page.
"""

import math
from collections.abc import Iterator, Sequence
from hashlib import sha256
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import NamedTuple

import torch
from torch import Tensor

from model.architecture import Architecture
from model.errors import InputError

PAGE = 16
"""Slots of a page; `kernels.cpp` reads that many keys at once."""


class KVCache(NamedTuple):
    """One layer's `keys` [pages, K, H, S] and `values` [pages, K, S, H]."""

    keys: Tensor
    values: Tensor


class Place(NamedTuple):
    """Where the tokens of a step stand: token t is at `positions[t]` of the sequence whose pages are `tables[rows[t]]`.

    `rotary` holds every position's rotation, see `model.llama.rotary_table`.
    """

    rotary_C2H: Tensor
    positions_T: Tensor
    rows_T: Tensor
    tables_BP: Tensor


class CacheFullError(InputError):
    """The sequence does not fit beside those that are open; it would when some have ended."""


def new_caches(arch: Architecture, pages: int, dtype: torch.dtype) -> list[KVCache]:
    """Zeroed pages for every layer; memory is taken as pages are first written."""
    keys, values = (pages, arch.kv_heads, arch.head_dim, PAGE), (pages, arch.kv_heads, PAGE, arch.head_dim)
    return [KVCache(_zeros(keys, dtype), _zeros(values, dtype)) for _ in range(arch.layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that the system makes when they are touched; `torch.zeros` writes them all, which takes time and memory."""
    untouched = mmap(-1, math.prod(shape) * dtype.itemsize, MAP_PRIVATE | MAP_ANONYMOUS)
    return torch.frombuffer(untouched, dtype=dtype).view(shape)


def single_sequence(rotary_C2H: Tensor, tokens: int) -> Place:
    """The place of `tokens` tokens that are a whole sequence, on the pages 0, 1, 2…"""
    pages = torch.arange(-(-tokens // PAGE), dtype=torch.int32)
    return Place(rotary_C2H, torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64), pages[None])


class TokenSequence:
    """At most `room` tokens, and the pages that hold the keys and values of the first `computed` of them."""

    def __init__(self, tokens: Sequence[int], room: int, pages: list[int], shared: int) -> None:
        self.tokens = list(tokens)
        self.room = room
        self.computed = self.reused = shared * PAGE
        self.pages = pages
        self.table_P = torch.tensor(pages, dtype=torch.int32)
        self.keys = _Keys()


class Pages:
    """Which pages are held, known and free."""

    def __init__(self, count: int) -> None:
        self._free = list(reversed(range(count)))
        self._holders = [0] * count
        self._known: dict[bytes, int] = {}  # in the order of last use
        self._key_of: dict[int, bytes] = {}
        self.count = count

    def open(self, tokens: Sequence[int], room: int) -> TokenSequence:
        """A sequence with pages for `room` tokens in all; known pages are shared, up to the last token's.

        Raises CacheFullError, and takes nothing, if there are not enough pages.
        """
        shared = self._shared(tokens[:-1])
        for page in shared:
            self._hold(page)
        missing = -(-room // PAGE) - len(shared)
        if missing > len(self._free) + self._unheld():
            self._release(reversed(shared))
            raise CacheFullError(
                f"the KV cache holds {PAGE * self.count} tokens, and a sequence of {room} does not fit beside the open"
                " ones: wait for one to end"
            )
        pages = shared + [self._take() for _ in range(missing)]
        return TokenSequence(tokens, room, pages, len(shared))

    def publish(self, sequence: TokenSequence) -> None:
        """Makes the pages known that have become full."""
        for index in range(sequence.keys.pages, sequence.computed // PAGE):
            key, page = sequence.keys.next(sequence.tokens), sequence.pages[index]
            if key not in self._known and page not in self._key_of:
                self._known[key], self._key_of[page] = page, key

    def close(self, sequence: TokenSequence) -> None:
        """Gives the pages back; closing twice does nothing."""
        self._release(reversed(sequence.pages))
        sequence.pages, sequence.room = [], 0

    def forget(self) -> None:
        """Frees every known page that no sequence holds."""
        for page in [page for page in self._known.values() if not self._holders[page]]:
            self._free.append(self._unknow(page))

    def _shared(self, tokens: Sequence[int]) -> list[int]:
        pages, keys = [], _Keys()
        for _ in range(len(tokens) // PAGE):
            key = keys.next(tokens)
            if key not in self._known:
                break
            pages.append(self._known[key])
        return pages

    def _hold(self, page: int) -> None:
        self._holders[page] += 1

    def _take(self) -> int:
        page = self._free.pop() if self._free else self._unknow(next(self._unheld_pages()))
        self._hold(page)
        return page

    def _unheld(self) -> int:
        return sum(1 for _ in self._unheld_pages())

    def _unheld_pages(self) -> Iterator[int]:
        return (page for page in self._known.values() if not self._holders[page])

    def _release(self, pages: "Sequence[int] | Iterator[int]") -> None:
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                key = self._key_of.get(page)
                if key is None:
                    self._free.append(page)
                else:
                    self._known[key] = self._known.pop(key)  # now the latest used

    def _unknow(self, page: int) -> int:
        del self._known[self._key_of.pop(page)]
        return page


class _Keys:
    """Names the full pages of a sequence one after the other: a digest of a page's tokens and all before them."""

    def __init__(self) -> None:
        self.pages = 0
        self._digest = sha256()

    def next(self, tokens: Sequence[int]) -> bytes:
        self._digest.update(repr(list(tokens[PAGE * self.pages : PAGE * (self.pages + 1)])).encode())
        self.pages += 1
        return self._digest.digest()
