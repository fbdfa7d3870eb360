"""Generation with real tiny networks, eager and compiled: prefixes, batches, room and faults."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import SafetensorsCheckpoint
from model.engine import Engine, Piece, Reply
from model.errors import InputError
from model.kv_cache import PAGE, CacheFullError, KVCache, Place, TokenSequence
from model.llama import Model, Network
from model.networks import float_network
from model.program import CompiledModel
from model.sampling import LogitsError, Sampling
from model.tokenizer import Tokenizer
from tests.model.conftest import CONTEXT, GREEDY, all_logits, random_tokens, text_of


@pytest.fixture(scope="module")
def network(speaking_model: Path) -> Network:
    return float_network(SafetensorsCheckpoint(speaking_model), torch.float32)


@pytest.fixture
def engine(network: Network, tiny_tokenizer: Tokenizer) -> Engine:
    """Eager, in float32."""
    return Engine(network, tiny_tokenizer, CONTEXT)


@pytest.fixture
def exact(compiled: CompiledModel, tiny_tokenizer: Tokenizer) -> Engine:
    """Compiled: its logits are the same to the bit, however their computation is divided."""
    return Engine(compiled, tiny_tokenizer, CONTEXT, sequences=8)


def alone(engine: Engine, prompt: Sequence[int], sampling: Sampling = GREEDY) -> str:
    """What a reply says that shares nothing with others."""
    engine.forget()
    text = text_of(list(engine.generate(prompt, sampling)))
    engine.forget()
    return text


def recomputed(model: Model, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens, the whole sequence computed anew for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(all_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def reused(engine: Engine, tokens: Sequence[int]) -> int:
    """How many tokens of a prompt the engine knows."""
    sequence = engine.begin(tokens, len(tokens))
    engine.end(sequence)
    return sequence.reused


def computed(engine: Engine, sequence: TokenSequence) -> Tensor:
    """The logits after all of a sequence's tokens."""
    while True:
        (logits_V,) = engine.advance([sequence])
        if logits_V is not None:
            return logits_V


def step(engine: Engine, replies: Sequence[Reply]) -> list[Piece | None]:
    """A step in which every reply's logits are numbers."""
    pieces = engine.step(replies)
    assert not any(isinstance(piece, LogitsError) for piece in pieces)
    return [piece for piece in pieces if not isinstance(piece, LogitsError)]


def assert_all_room_is_free(engine: Engine, sequences: int = 2) -> None:
    opened = [engine.begin([5], CONTEXT) for _ in range(sequences)]
    for sequence in opened:
        engine.end(sequence)


# One reply


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
def test_greedy_text_is_that_of_full_recomputation(engine: Engine, network: Network, length: int) -> None:
    prompt = random_tokens(length)
    pieces = list(engine.generate(prompt, GREEDY))
    assert text_of(pieces) == engine.tokenizer.decode(recomputed(network, prompt, 24))
    assert [piece.tokens for piece in pieces] == [*range(1, 24), 24]
    assert pieces[-1].finish_reason == "length"
    assert len(set(text_of(pieces))) > 3


@pytest.mark.parametrize("length", [1, 16, 100])
def test_compiled_text_is_that_of_full_recomputation(exact: Engine, compiled: CompiledModel, length: int) -> None:
    prompt = random_tokens(length)
    expected = recomputed(compiled, prompt, 24)
    assert text_of(list(exact.generate(prompt, GREEDY))) == exact.tokenizer.decode(expected)
    assert list(exact.greedy(prompt, 24)) == expected


def test_sampling_is_reproducible_and_fresh_without_a_seed(engine: Engine) -> None:
    def reply(seed: int | None) -> str:
        return text_of(list(engine.generate([2, 3, 4], Sampling(temperature=2, top_p=1, seed=seed, max_tokens=20))))

    assert reply(7) == reply(7)
    assert len({reply(7), reply(8), reply(None), reply(None)}) == 4


def test_empty_prompt(engine: Engine) -> None:
    for ask in (engine.generate, engine.open):
        with pytest.raises(InputError, match="the prompt is empty"):
            ask([], GREEDY)


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1])
def test_too_long_prompt(engine: Engine, length: int) -> None:
    for ask in (engine.generate, engine.open):
        with pytest.raises(InputError, match=f"the prompt has {length} tokens, and the context holds {CONTEXT}"):
            ask([5] * length, GREEDY)


@pytest.mark.parametrize("room", [1, 2, 10])
def test_full_context_ends_the_reply(engine: Engine, network: Network, room: int) -> None:
    prompt = random_tokens(CONTEXT - room)
    pieces = list(engine.generate(prompt, GREEDY))
    assert (pieces[-1].finish_reason, pieces[-1].tokens) == ("length", room)
    assert text_of(pieces) == engine.tokenizer.decode(recomputed(network, prompt, room))


# What earlier sequences have left


def test_known_beginning_is_not_computed_again(exact: Engine) -> None:
    """Whole pages are shared, and never the last token, whose logits are asked for."""
    persona = random_tokens(58)
    exact.next_logits(persona)
    for tokens, pages in [
        ([*persona, 33], 3),
        (persona, 3),
        (persona[: 3 * PAGE], 2),
        (persona[: 3 * PAGE + 1], 3),
        (persona[:PAGE], 0),
        ([*persona[:40], 70, 71], 2),
        ([persona[0] + 1, *persona[1:]], 0),
        ([3, *persona], 0),
        (persona[PAGE:], 0),
        ([*persona[:PAGE], *persona[2 * PAGE :]], 1),
    ]:
        assert reused(exact, tokens) == pages * PAGE


@pytest.mark.parametrize("kind", [list, tuple])
def test_known_beginning_is_found_in_any_kind_of_sequence(
    exact: Engine, kind: Callable[[range], Sequence[int]]
) -> None:
    exact.next_logits(kind(range(2, 60)))
    assert [reused(exact, prompt) for prompt in (tuple(range(2, 60)), list(range(2, 60)), range(2, 60))] == [48] * 3


def test_logits_do_not_depend_on_what_is_known(exact: Engine) -> None:
    persona = random_tokens(100)
    prompts = [[*persona, *random_tokens(count)] for count in (1, 2, 16, 40)]
    fresh = []
    for prompt in prompts:
        exact.forget()
        fresh.append(exact.next_logits(prompt))
    exact.forget()
    for prompt, expected in zip(prompts, fresh, strict=True):
        assert torch.equal(exact.next_logits(prompt), expected)
        assert torch.equal(exact.next_logits(prompt), expected)
    assert reused(exact, prompts[0]) == 6 * PAGE


def test_text_does_not_depend_on_what_is_known(engine: Engine) -> None:
    persona = random_tokens(58)
    questions = ([70, 71, 72], [70, 80], [70, 71, 72, 73], [90])
    expected = [alone(engine, [*persona, *question]) for question in questions]
    assert [text_of(list(engine.generate([*persona, *question], GREEDY))) for question in questions] == expected
    assert reused(engine, [*persona, 70]) == 3 * PAGE


def test_reply_is_known_to_the_next_turn(engine: Engine) -> None:
    prompt = random_tokens(38)
    reply = engine.tokenizer.encode(text_of(list(engine.generate(prompt, GREEDY))))
    assert len(reply) == 24
    # the last token drawn was never an input: of 62 tokens 61 are computed
    assert reused(engine, [*prompt, *reply, 50, 51]) == 3 * PAGE


def test_forget_computes_everything_again(engine: Engine) -> None:
    prompt = random_tokens(40)
    engine.next_logits(prompt)
    assert reused(engine, prompt) == 2 * PAGE
    engine.forget()
    assert reused(engine, prompt) == 0


def test_forget_leaves_open_replies_alone(exact: Engine) -> None:
    prompt = random_tokens(40)
    expected = alone(exact, prompt)
    reply, pieces = exact.open(prompt, GREEDY), list[Piece | None]()
    while reply.finish_reason is None:
        exact.forget()
        pieces += step(exact, [reply])
        exact.next_logits(random_tokens(60, seed=len(pieces)))
    exact.close(reply)
    assert text_of([piece for piece in pieces if piece]) == expected


# Several replies


PERSONA = random_tokens(50)
REQUESTS = [
    ([5], GREEDY),
    (random_tokens(15), Sampling(temperature=0, max_tokens=1)),
    (random_tokens(16), Sampling(temperature=1, seed=1, max_tokens=30)),
    ([*PERSONA, 60], Sampling(temperature=1.5, top_p=0.9, top_k=20, seed=2, max_tokens=40)),
    ([*PERSONA, 61, 62], Sampling(temperature=0, repetition_penalty=1.3, presence_penalty=0.5, max_tokens=40)),
    (random_tokens(90), Sampling(temperature=1, seed=3, stop=("a", "b", "c"), max_tokens=60)),
    (random_tokens(CONTEXT - 3), Sampling(temperature=0, max_tokens=10)),
]


class Conversation:
    """Requests that come, go on and go in an order drawn at random; some leave before their end."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine, self._random = engine, random.Random(seed)
        self._waiting = [*REQUESTS, REQUESTS[3], REQUESTS[5]]  # two are there twice
        self._random.shuffle(self._waiting)
        self._open: list[tuple[Reply, tuple[list[int], Sampling], list[Piece]]] = []
        self.ended: list[tuple[tuple[list[int], Sampling], str]] = []

    def run(self) -> None:
        while self._waiting or self._open:
            if self._waiting and len(self._open) < 5 and self._random.random() < 0.3:
                request = self._waiting.pop()
                self._open.append((self._engine.open(*request), request, []))
            chosen = [one for one in self._open if self._random.random() < 0.8]
            if chosen:
                self._step(chosen)
            if self._open and self._random.random() < 0.01:
                self._engine.close(self._open.pop(0)[0])

    def _step(self, chosen: list[tuple[Reply, tuple[list[int], Sampling], list[Piece]]]) -> None:
        self._random.shuffle(chosen)
        for one, piece in zip(chosen, step(self._engine, [reply for reply, _, _ in chosen]), strict=True):
            reply, request, pieces = one
            pieces += [piece] if piece else []
            if reply.finish_reason is not None:
                self._engine.close(reply)
                self._open.remove(one)
                self.ended.append((request, text_of(pieces)))


@pytest.mark.parametrize("step_tokens", [3, 16, 50, 512])
def test_replies_say_together_what_each_says_alone(
    exact: Engine, monkeypatch: pytest.MonkeyPatch, step_tokens: int
) -> None:
    expected = [(request, alone(exact, *request)) for request in REQUESTS]
    monkeypatch.setattr("model.engine.STEP_TOKENS", step_tokens)
    ended = 0
    for seed in range(5):
        conversation = Conversation(exact, seed)
        conversation.run()
        assert all(end in expected for end in conversation.ended)
        ended += len(conversation.ended)
    assert ended > 5 * 6
    assert_all_room_is_free(exact, sequences=8)


def test_eager_replies_say_together_what_each_says_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[5], random_tokens(40), [*PERSONA, 7], [*PERSONA, 8]]
    expected = [alone(engine, prompt) for prompt in prompts]
    monkeypatch.setattr("model.engine.STEP_TOKENS", 32)
    replies = [engine.open(prompt, GREEDY) for prompt in prompts]
    texts = [""] * len(replies)
    while any(reply.finish_reason is None for reply in replies):
        going = [reply for reply in replies if reply.finish_reason is None]
        for reply, piece in zip(going, step(engine, going), strict=True):
            texts[replies.index(reply)] += piece.text if piece else ""
    assert texts == expected


def test_decoding_goes_on_while_a_prompt_is_computed(exact: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.engine.STEP_TOKENS", 16)
    decoding = exact.open([5, 6], GREEDY)
    assert exact.step([decoding]) != [None]
    reading = exact.open(random_tokens(100), GREEDY)
    steps = [exact.step([reading, decoding]) for _ in range(7)]
    assert all(piece is not None for _, piece in steps)
    assert [piece is not None for piece, _ in steps] == [False] * 6 + [True]  # 100 tokens, 15 a step


@pytest.mark.parametrize("step_tokens", [1, 16, 17, 48])
def test_long_prompt_in_pieces_equals_one_pass(
    engine: Engine, exact: Engine, monkeypatch: pytest.MonkeyPatch, step_tokens: int
) -> None:
    prompts = [random_tokens(length) for length in (2, 16, 17, 48, 130)]
    whole = [(engine.next_logits(prompt), exact.next_logits(prompt)) for prompt in prompts]
    engine.forget()
    exact.forget()
    monkeypatch.setattr("model.engine.STEP_TOKENS", step_tokens)
    for prompt, (eager_V, compiled_V) in zip(prompts, whole, strict=True):
        torch.testing.assert_close(engine.next_logits(prompt), eager_V, rtol=0, atol=1e-5)
        assert torch.equal(exact.next_logits(prompt), compiled_V)


def test_one_pass_over_many_sequences_equals_one_each(exact: Engine) -> None:
    prompts = [random_tokens(length) for length in (1, 2, 3, 16, 17, 33, 100)]
    single = [exact.next_logits(prompt) for prompt in prompts]
    exact.forget()
    sequences = [exact.begin(prompt, len(prompt)) for prompt in prompts]
    for logits_V, expected_V in zip(exact.advance(sequences), single, strict=True):
        assert logits_V is not None and torch.equal(logits_V, expected_V)
    for sequence in sequences:
        exact.end(sequence)


# Room


def test_full_cache_refuses_until_a_reply_is_closed(engine: Engine) -> None:
    prompt, whole = random_tokens(40), Sampling(temperature=0, max_tokens=CONTEXT)
    expected = alone(engine, prompt)
    replies = [engine.open(prompt, whole), engine.open(random_tokens(41), whole)]
    texts = [""] * 2
    for _ in range(10):
        for row, piece in enumerate(step(engine, replies)):
            texts[row] += piece.text if piece else ""
        with pytest.raises(CacheFullError, match="a sequence of 200 does not fit beside the open ones: wait for one"):
            engine.open(prompt, whole)
    assert expected.startswith(texts[0]) and len(texts[0]) > 5
    engine.close(replies[1])
    assert alone(engine, prompt) == expected
    engine.close(replies[0])
    assert_all_room_is_free(engine)


def test_reply_takes_the_room_it_may_need_and_no_more(engine: Engine) -> None:
    small = Sampling(temperature=0, max_tokens=PAGE - 1)
    pages = 2 * -(-CONTEXT // PAGE)
    replies = [engine.open([5], small) for _ in range(pages)]
    with pytest.raises(CacheFullError):
        engine.open([5], small)
    for _ in range(PAGE - 1):
        engine.step(replies)
    assert {reply.finish_reason for reply in replies} == {"length"}
    for reply in replies:
        engine.close(reply)
    assert_all_room_is_free(engine)


def test_reply_closed_early_or_twice_gives_its_room_back_once(engine: Engine) -> None:
    for steps in range(6):
        reply = engine.open(random_tokens(150), Sampling(temperature=0, max_tokens=50))
        for _ in range(steps):
            engine.step([reply])
        engine.close(reply)
        engine.close(reply)
    assert_all_room_is_free(engine)
    with pytest.raises(CacheFullError):
        assert_all_room_is_free(engine, sequences=3)


def test_abandoned_reply_leaves_a_sound_cache(engine: Engine, network: Network) -> None:
    abandoned = engine.generate(random_tokens(50), GREEDY)
    next(abandoned)
    next(abandoned)
    prompt = [*random_tokens(50), 60]
    assert text_of(list(engine.generate(prompt, GREEDY))) == engine.tokenizer.decode(recomputed(network, prompt, 24))


@pytest.mark.parametrize("pieces", [0, 1, 5])
def test_closed_iterator_gives_the_room_back(engine: Engine, pieces: int) -> None:
    for _ in range(5):
        reply = engine.generate(random_tokens(100), GREEDY)
        for _ in range(pieces):
            next(reply)
        reply.close()  # type: ignore[attr-defined]  # a generator
    assert_all_room_is_free(engine)


# Faults


class Faulty:
    """A model that raises, or loses its numbers, in the step after one is named."""

    def __init__(self, model: Model) -> None:
        self.architecture, self.kv_dtype, self.bytes_per_token = model.architecture, model.kv_dtype, 0
        self._model = model
        self.fault = ""

    def embed(self, tokens_T: Tensor) -> Tensor:
        self._fail("embed")
        return self._model.embed(tokens_T)

    def layer(self, index: int, x_TD: Tensor, place: Place, cache: KVCache) -> Tensor:
        self._fail(f"layer {index}")
        return self._model.layer(index, x_TD, place, cache)

    def head(self, x_TD: Tensor) -> Tensor:
        self._fail("head")
        logits_TV = self._model.head(x_TD)
        if self.fault == "NaN":
            logits_TV[0, 7] = torch.nan
        return logits_TV

    def _fail(self, place: str) -> None:
        if self.fault == place:
            self.fault = ""
            raise MemoryError(place)


@pytest.fixture
def faulty(compiled: CompiledModel) -> Faulty:
    return Faulty(compiled)


@pytest.fixture
def fragile(faulty: Faulty, tiny_tokenizer: Tokenizer) -> Engine:
    return Engine(faulty, tiny_tokenizer, CONTEXT, sequences=4)


PLACES = ["embed", "layer 0", "layer 1", "head"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_failed_pass_can_be_repeated(fragile: Engine, faulty: Faulty, place: str, steps: int) -> None:
    """Nothing counts as computed that is not, and no token is lost."""
    prompts = [[5], random_tokens(40), [*PERSONA, 9]]
    expected = [alone(fragile, prompt) for prompt in prompts]
    replies = [fragile.open(prompt, GREEDY) for prompt in prompts]
    texts = [""] * len(replies)
    for number in range(24):
        if number == steps:
            faulty.fault = place
            with pytest.raises(MemoryError):
                fragile.step(replies)
        for row, piece in enumerate(step(fragile, replies)):
            assert piece is not None
            texts[row] += piece.text
    assert texts == expected


@pytest.mark.parametrize("place", PLACES)
def test_failed_pass_leaves_nothing_wrong_behind(fragile: Engine, faulty: Faulty, place: str) -> None:
    prompt = random_tokens(50)
    expected = fragile.next_logits(prompt)
    fragile.forget()
    for _ in range(10):
        faulty.fault = place
        with pytest.raises(MemoryError):
            fragile.next_logits(prompt)
        faulty.fault = place
        with pytest.raises(MemoryError):
            list(fragile.generate(prompt, GREEDY))
    assert torch.equal(fragile.next_logits([*prompt, 8]), fragile.next_logits([*prompt, 8]))
    assert torch.equal(fragile.next_logits(prompt), expected)
    assert_all_room_is_free(fragile, sequences=4)


def test_logits_that_are_no_numbers_end_the_reply(fragile: Engine, faulty: Faulty) -> None:
    prompt = random_tokens(50)
    expected = alone(fragile, prompt)
    pieces = fragile.generate(prompt, GREEDY)
    next(pieces)
    faulty.fault = "NaN"
    with pytest.raises(LogitsError, match="1 of the model's 512 logits are NaN or infinite"):
        next(pieces)
    faulty.fault = ""
    assert reused(fragile, prompt) == 0  # whatever led there is not taken up again
    assert text_of(list(fragile.generate(prompt, GREEDY))) == expected
    assert_all_room_is_free(fragile, sequences=4)
