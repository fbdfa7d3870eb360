"""Which pages sequences share, hold and give back; what is written to them is in `test_kernels` and `test_llama`."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from model.errors import InputError
from model.kv_cache import PAGE, CacheFullError, Pages, TokenSequence, new_caches, single_sequence
from tests.conftest import TINY

STORY = list(range(1000, 1000 + 8 * PAGE))


def compute(pages: Pages, sequence: TokenSequence, count: int | None = None) -> None:
    """What the engine does in a step: all pending tokens, or some."""
    pending = len(sequence.tokens) - sequence.computed
    sequence.computed += pending if count is None else min(count, pending)
    pages.publish(sequence)


def opened(pages: Pages, tokens: Sequence[int], room: int | None = None) -> TokenSequence:
    """A sequence whose tokens are computed."""
    sequence = pages.open(tokens, room or len(tokens))
    compute(pages, sequence)
    return sequence


def leave(pages: Pages, tokens: Sequence[int]) -> list[int]:
    """Opens, computes and closes a sequence; returns the pages it had."""
    sequence = opened(pages, tokens)
    had = sequence.pages
    pages.close(sequence)
    return had


def reused(pages: Pages, tokens: Sequence[int]) -> int:
    """How many tokens of a new sequence are known."""
    sequence = pages.open(tokens, len(tokens))
    pages.close(sequence)
    return sequence.reused


def fits(pages: Pages, room: int) -> bool:
    try:
        pages.close(pages.open([1], room))
    except CacheFullError:
        return False
    return True


def test_new_sequence_has_pages_for_all_its_room() -> None:
    pages = Pages(8)
    sequence = pages.open([1, 2, 3], 2 * PAGE + 1)
    assert (sequence.tokens, sequence.computed, sequence.reused) == ([1, 2, 3], 0, 0)
    assert sequence.room == 2 * PAGE + 1
    assert len(set(sequence.pages)) == 3
    assert set(sequence.pages) <= set(range(8))
    assert sequence.table_P.dtype == torch.int32
    assert sequence.table_P.tolist() == sequence.pages


def test_open_sequences_hold_different_pages() -> None:
    pages = Pages(6)
    first, second, third = (opened(pages, [7], 2 * PAGE) for _ in range(3))
    assert sorted(first.pages + second.pages + third.pages) == list(range(6))


@pytest.mark.parametrize("kind", [list[int], tuple[int, ...]], ids=["list", "tuple"])
@pytest.mark.parametrize(
    ("tokens", "shared"),
    [
        (STORY, 7 * PAGE),  # not the last token's page: its logits are wanted
        (STORY[: 3 * PAGE + 1], 3 * PAGE),
        (STORY[: 3 * PAGE], 2 * PAGE),
        (STORY[: 3 * PAGE - 1], 2 * PAGE),
        (STORY[:PAGE], 0),
        ([*STORY, 5, 6], 8 * PAGE),
        ([*STORY[:40], 5, *STORY[41:]], 2 * PAGE),
        ([5, *STORY[1:]], 0),
        (STORY[PAGE:], 0),  # the same tokens elsewhere are others
        ([], 0),
    ],
)
def test_known_beginning_is_shared_by_whole_pages(
    tokens: list[int], shared: int, kind: Callable[[list[int]], Sequence[int]]
) -> None:
    pages = Pages(32)
    had = leave(pages, STORY)
    sequence = pages.open(kind(tokens), len(tokens) + 4)
    assert sequence.reused == sequence.computed == shared
    assert sequence.pages[: shared // PAGE] == had[: shared // PAGE]
    assert not set(sequence.pages[shared // PAGE :]) & set(had)


def test_pages_are_shared_while_their_first_holder_is_open() -> None:
    pages = Pages(16)
    first, second = opened(pages, STORY), opened(pages, [*STORY[: 2 * PAGE], 1])
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] not in first.pages
    pages.close(first)
    assert not set(opened(pages, [9], 13 * PAGE).pages) & set(second.pages)


def test_only_computed_and_published_pages_are_known() -> None:
    pages = Pages(32)
    sequence = pages.open(STORY, len(STORY))
    assert reused(pages, STORY) == 0
    compute(pages, sequence, 2 * PAGE - 1)
    assert reused(pages, STORY) == PAGE
    sequence.computed += 1
    assert reused(pages, STORY) == PAGE
    pages.publish(sequence)
    assert reused(pages, STORY) == 2 * PAGE
    pages.close(sequence)
    assert reused(pages, STORY) == 2 * PAGE


def test_generated_tokens_are_known_like_prompts() -> None:
    pages = Pages(32)
    sequence = opened(pages, STORY[:20], 100)
    for token in STORY[20:50]:
        sequence.tokens.append(token)
        compute(pages, sequence)
    assert reused(pages, STORY) == 3 * PAGE


def test_publishing_again_changes_nothing() -> None:
    pages = Pages(9)
    sequence = opened(pages, STORY)
    for _ in range(3):
        pages.publish(sequence)
    pages.close(sequence)
    assert reused(pages, [*STORY, 1]) == 8 * PAGE
    assert fits(pages, 9 * PAGE)


def test_closing_twice_gives_back_once() -> None:
    pages = Pages(4)
    sequence = pages.open([1], 2 * PAGE)
    for _ in range(2):
        pages.close(sequence)
    assert (sequence.pages, sequence.room) == ([], 0)
    first, second = pages.open([1], 2 * PAGE), pages.open([1], 2 * PAGE)
    pages.close(sequence)
    assert sorted(first.pages + second.pages) == [0, 1, 2, 3]
    assert not fits(pages, 1)


def test_full_cache_refuses_and_takes_nothing() -> None:
    pages = Pages(8)
    open_one = opened(pages, STORY[: 3 * PAGE])
    with pytest.raises(CacheFullError, match=r"holds 128 tokens, and a sequence of 145 does not fit .* wait for one"):
        pages.open(STORY, 8 * PAGE + 17)
    assert issubclass(CacheFullError, InputError)
    assert fits(pages, 5 * PAGE)
    assert not fits(pages, 5 * PAGE + 1)
    assert reused(pages, STORY[: 3 * PAGE + 1]) == 3 * PAGE
    pages.close(open_one)
    assert fits(pages, 8 * PAGE)


def test_shared_pages_need_no_room() -> None:
    """Seven known pages are open; the eighth is all that a sequence with the same beginning takes."""
    pages = Pages(8)
    opened(pages, STORY[: 7 * PAGE])
    assert fits(pages, PAGE)
    assert not fits(pages, 2 * PAGE)
    sequence = pages.open(STORY[: 7 * PAGE + 3], 8 * PAGE)
    assert sequence.reused == 7 * PAGE


def test_known_pages_a_sequence_shares_do_not_count_as_room_for_it() -> None:
    pages = Pages(8)
    leave(pages, STORY[: 4 * PAGE])
    blocker = pages.open([1], 4 * PAGE)
    with pytest.raises(CacheFullError):
        pages.open(STORY[: 3 * PAGE + 1], 5 * PAGE)  # three shared and one evicted, one too few
    assert len(pages.open(STORY[: 3 * PAGE + 1], 4 * PAGE).pages) == 4
    assert len(blocker.pages) == 4


def test_longest_unused_pages_are_evicted_first() -> None:
    """Of three stories, the one told last stays longest, and of each story its beginning."""
    stories = [[story, *STORY[1 : 4 * PAGE]] for story in range(3)]

    def left(story: list[int], taken: int) -> int:
        pages = Pages(12)
        for one in [*stories, stories[0]]:
            leave(pages, one)
        pages.close(pages.open([9], taken * PAGE))
        return reused(pages, [*story, 9]) // PAGE

    kept = [tuple(left(story, taken) for story in stories) for taken in range(13)]
    assert kept[:5] == [(4, 4, 4), (4, 3, 4), (4, 2, 4), (4, 1, 4), (4, 0, 4)]
    assert kept[5:9] == [(4, 0, 3), (4, 0, 2), (4, 0, 1), (4, 0, 0)]
    assert kept[9:] == [(3, 0, 0), (2, 0, 0), (1, 0, 0), (0, 0, 0)]


def test_refused_sequence_leaves_beginnings_more_useful_than_ends() -> None:
    """Of what the refused sequence would have shared, others evict the end first, as if it had not asked."""
    pages = Pages(6)
    leave(pages, STORY[: 4 * PAGE])
    blocker = pages.open([1], 2 * PAGE)
    with pytest.raises(CacheFullError):
        pages.open(STORY[: 4 * PAGE], 7 * PAGE)
    opened(pages, [2], 2 * PAGE)
    pages.close(blocker)
    assert reused(pages, STORY[: 4 * PAGE]) == 2 * PAGE


def test_free_pages_are_taken_before_known_ones() -> None:
    pages = Pages(8)
    leave(pages, STORY[: 4 * PAGE])
    opened(pages, [1], 4 * PAGE)
    assert reused(pages, STORY[: 4 * PAGE]) == 3 * PAGE


def test_pages_in_use_are_never_evicted() -> None:
    pages = Pages(8)
    sequence = opened(pages, STORY[: 4 * PAGE])
    for _ in range(3):
        other = opened(pages, [1], 4 * PAGE)
        assert not set(other.pages) & set(sequence.pages)
        assert not fits(pages, 1)
        pages.close(other)
    assert reused(pages, STORY[: 4 * PAGE + 1]) == 4 * PAGE


def test_forgetting_frees_what_no_sequence_holds() -> None:
    pages = Pages(16)
    leave(pages, [1, *STORY[1:]])
    sequence = opened(pages, STORY[: 2 * PAGE])
    pages.forget()
    assert reused(pages, [1, *STORY[1:]]) == 0
    assert reused(pages, STORY) == 2 * PAGE
    pages.close(sequence)
    pages.forget()
    assert reused(pages, STORY) == 0
    assert fits(pages, 16 * PAGE)


def test_two_sequences_may_compute_the_same_beginning_at_once() -> None:
    """Each writes pages of its own; those of the faster become known, and the others are free afterwards."""
    pages = Pages(24)
    first, second = pages.open(STORY, len(STORY)), pages.open(STORY, len(STORY))
    for _ in range(8):
        for sequence in (first, second):
            compute(pages, sequence, PAGE)
            assert not set(first.pages) & set(second.pages)
    third = pages.open([*STORY, 1], len(STORY) + 1)
    assert third.pages[:8] == first.pages
    pages.close(second)
    pages.close(first)
    assert fits(pages, (24 - 9) * PAGE)
    assert not fits(pages, (24 - 9) * PAGE + 1)
    pages.close(third)
    assert reused(pages, [*STORY, 1]) == 8 * PAGE
    assert fits(pages, 24 * PAGE)


class Checked:
    """`Pages`, checked against what is written to each slot of each page, through its public interface."""

    def __init__(self, count: int) -> None:
        self.pages = Pages(count)
        self.open_ones: list[TokenSequence] = []
        self.known: dict[tuple[int, ...], int] = {}
        self.written: dict[tuple[int, int], tuple[int, ...]] = {}  # by page and slot: all tokens up to the slot's
        self.counts = {"shared": 0, "evicted": 0, "refused": 0}

    def held(self) -> set[int]:
        return {page for sequence in self.open_ones for page in sequence.pages}

    def open(self, tokens: list[int], room: int) -> None:
        """Refused exactly if there is no room; shares exactly what is known; evicts no more than it must."""
        ends = range(PAGE, len(tokens), PAGE)
        shared = [self.known.get(tuple(tokens[:end])) for end in ends]
        shared = shared[: shared.index(None)] if None in shared else shared
        missing, held = -(-room // PAGE) - len(shared), self.held() | set(shared)
        free = self.pages.count - len(held | set(self.known.values()))
        if missing > self.pages.count - len(held):
            self.counts["refused"] += 1
            with pytest.raises(CacheFullError):
                self.pages.open(tokens, room)
            return
        sequence = self.pages.open(tokens, room)
        fresh = sequence.pages[len(shared) :]
        evicted = [prefix for prefix, page in self.known.items() if page in fresh]
        assert sequence.pages[: len(shared)] == shared
        assert sequence.reused == PAGE * len(shared)
        assert len(set(fresh)) == missing
        assert not set(fresh) & held
        assert len(evicted) == max(0, missing - free)
        for prefix in evicted:
            del self.known[prefix]
        self.open_ones.append(sequence)
        self.counts["shared"] += len(shared)
        self.counts["evicted"] += len(evicted)

    def compute(self, sequence: TokenSequence, count: int) -> None:
        """Writes slots that no other open sequence holds."""
        for at in range(sequence.computed, min(sequence.computed + count, len(sequence.tokens))):
            page = sequence.pages[at // PAGE]
            assert sum(page in other.pages for other in self.open_ones) == 1
            assert page not in self.known.values()
            self.written[page, at % PAGE] = tuple(sequence.tokens[: at + 1])
        full = sequence.computed // PAGE
        compute(self.pages, sequence, count)
        for index in range(full, sequence.computed // PAGE):
            prefix = tuple(sequence.tokens[: PAGE * (index + 1)])
            if prefix not in self.known:
                self.known[prefix] = sequence.pages[index]

    def close(self, sequence: TokenSequence) -> None:
        self.open_ones.remove(sequence)
        self.pages.close(sequence)

    def forget(self) -> None:
        self.known = {prefix: page for prefix, page in self.known.items() if page in self.held()}
        self.pages.forget()

    def check(self) -> None:
        """Every open sequence finds in its pages what it or another computed for just these tokens."""
        for sequence in self.open_ones:
            for at in range(sequence.computed):
                assert self.written[sequence.pages[at // PAGE], at % PAGE] == tuple(sequence.tokens[: at + 1])


@pytest.mark.parametrize("seed", range(4))
def test_random_use_keeps_every_promise(seed: int) -> None:
    dice = random.Random(seed)
    checked = Checked(24)
    beginnings = [dice.choices(range(3), k=6 * PAGE) for _ in range(3)]
    for _ in range(400):
        choice, sequence = dice.random(), dice.choice(checked.open_ones or [None])
        if choice < 0.3 or sequence is None:
            tokens = dice.choice(beginnings)[: dice.randrange(6 * PAGE)] + dice.choices(
                range(3), k=dice.randrange(1, 40)
            )
            checked.open(tokens, len(tokens) + dice.randrange(40))
        elif choice < 0.75:
            if sequence.computed == len(sequence.tokens) < sequence.room:
                sequence.tokens.append(dice.randrange(3))
            checked.compute(sequence, dice.choice([1, PAGE, 50]))
        elif choice < 0.98:
            checked.close(sequence)
        else:
            checked.forget()
        checked.check()
    assert min(checked.counts.values()) > 20, checked.counts
    while checked.open_ones:
        checked.close(checked.open_ones[-1])
    assert fits(checked.pages, checked.pages.count * PAGE)


def test_caches_are_zeroed_pages_for_every_layer() -> None:
    caches = new_caches(TINY, 5, torch.bfloat16)
    assert len(caches) == TINY.layers
    for cache in caches:
        assert cache.keys.shape == (5, TINY.kv_heads, TINY.head_dim, PAGE)
        assert cache.values.shape == (5, TINY.kv_heads, PAGE, TINY.head_dim)
        assert cache.keys.dtype == cache.values.dtype == torch.bfloat16
        assert not cache.keys.any()
        assert not cache.values.any()


@pytest.mark.parametrize(("tokens", "pages"), [(1, [0]), (PAGE, [0]), (PAGE + 1, [0, 1]), (40, [0, 1, 2])])
def test_place_of_a_whole_sequence(tokens: int, pages: list[int]) -> None:
    rotary = torch.zeros(1)
    place = single_sequence(rotary, tokens)
    assert place.rotary_C2H is rotary
    assert place.positions_T.tolist() == list(range(tokens))
    assert place.rows_T.tolist() == [0] * tokens
    assert place.tables_BP.tolist() == [pages]
    assert (place.positions_T.dtype, place.rows_T.dtype, place.tables_BP.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
