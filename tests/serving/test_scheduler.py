"""Many requests at once on the real embedded model: equality, fairness, limits, cancellation, draining."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from model.engine import Engine, Piece, Reply
from model.errors import InputError
from model.sampling import LogitsError, Sampling
from serving.scheduler import ClosingError, OutOfTimeError, QueueFullError, Scheduler, Ticket

PROMPTS = ["Once upon a time", "The road to the city", "In the morning", "A bell rang"]


@pytest.fixture(scope="module")
def engine(embedded_build: Path) -> Engine:
    return Engine.load(embedded_build / "engine", sequences=2)


@pytest.fixture
def start(engine: Engine) -> Iterator[Callable[..., Scheduler]]:
    """Makes schedulers, and closes them in the end."""
    made: list[Scheduler] = []

    def make(running_max: int = 4, waiting_max: int = 32) -> Scheduler:
        engine.forget()
        made.append(Scheduler(engine, running_max=running_max, waiting_max=waiting_max, threads=2))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close(0)


class Asked:
    """One request and what came of it."""

    def __init__(self, scheduler: Scheduler, engine: Engine, prompt: str, client: str = "a", **wishes: object) -> None:
        fields = {"temperature": 0.0, "max_tokens": 24, **wishes}
        seconds = float(str(fields.pop("seconds", 60)))
        self.came: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
        self.ticket = Ticket(Sampling(**fields), client, seconds, self.came.put)  # type: ignore[arg-type]
        scheduler.submit(self.ticket, engine.tokenizer.encode(prompt))

    def next(self) -> Piece:
        piece = self.came.get(timeout=30)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def text(self) -> str:
        """The whole reply."""
        text, piece = "", None
        while piece is None or piece.finish_reason is None:
            piece = self.next()
            text += piece.text
        return text


def alone(engine: Engine, prompt: str, tokens: int = 24) -> str:
    engine.forget()
    return "".join(
        piece.text
        for piece in engine.generate(engine.tokenizer.encode(prompt), Sampling(temperature=0, max_tokens=tokens))
    )


def idle(scheduler: Scheduler) -> bool:
    for _ in range(100):
        if not (scheduler.running or scheduler.waiting):
            return True
        time.sleep(0.05)
    return False


def test_replies_at_once_are_those_made_alone(engine: Engine, start: Callable[..., Scheduler]) -> None:
    expected = [alone(engine, prompt) for prompt in PROMPTS]
    scheduler = start(running_max=3)
    asked = [Asked(scheduler, engine, prompt) for prompt in PROMPTS * 3]
    assert [one.text() for one in asked] == expected * 3
    assert idle(scheduler)
    assert all(one.ticket.tokens == 24 and one.ticket.cpu_seconds > 0 for one in asked)
    assert all((one.ticket.ttft_s or 0) > 0 and (one.ticket.tpot_s or 0) > 0 for one in asked)


def test_lookups_of_one_thread_leave_the_model_its_threads(
    engine: Engine, start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, step, seen = start(), Engine.step, set[int]()

    def watched(self: Engine, replies: Sequence[Reply]) -> object:
        seen.add(torch.get_num_threads())
        return step(self, replies)

    monkeypatch.setattr(Engine, "step", watched)
    lookup = threading.Thread(target=torch.set_num_threads, args=(1,))
    lookup.start()
    lookup.join()
    assert Asked(scheduler, engine, PROMPTS[0]).text()
    assert seen == {2}


def test_a_known_prompt_is_reused_and_counted(engine: Engine, start: Callable[..., Scheduler]) -> None:
    scheduler = start()
    long = " ".join(PROMPTS * 4)
    for expected in (False, True):
        asked = Asked(scheduler, engine, long)
        asked.text()
        assert (asked.ticket.cached_tokens > 0) is expected


def test_a_client_with_many_requests_does_not_keep_another_waiting(
    engine: Engine, start: Callable[..., Scheduler]
) -> None:
    scheduler = start(running_max=1)
    ends: list[str] = []
    greedy = [Asked(scheduler, engine, PROMPTS[0], "greedy") for _ in range(6)]
    modest = Asked(scheduler, engine, PROMPTS[1], "modest")

    def wait(name: str, asked: Asked) -> None:
        asked.text()
        ends.append(name)

    threads = [threading.Thread(target=wait, args=("greedy", one)) for one in greedy]
    threads.append(threading.Thread(target=wait, args=("modest", modest)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends.index("modest") <= 1


def test_clients_that_keep_coming_do_not_overtake_one_that_was_served_before(
    engine: Engine, start: Callable[..., Scheduler]
) -> None:
    scheduler = start(running_max=1)
    first = Asked(scheduler, engine, PROMPTS[0], "regular", max_tokens=100)
    first.next()
    second = Asked(scheduler, engine, PROMPTS[1], "regular", max_tokens=1)
    others = [Asked(scheduler, engine, PROMPTS[2], f"new {number}", max_tokens=1) for number in range(4)]
    first.ticket.cancel()
    for asked in (second, *others):
        asked.text()
    begun = [asked.ticket.first_token for asked in (second, *others)]
    assert begun == sorted(begun, key=float)  # type: ignore[arg-type]


def test_a_full_queue_refuses_and_says_when_to_come_back(engine: Engine, start: Callable[..., Scheduler]) -> None:
    scheduler = start(running_max=1, waiting_max=2)
    asked = [Asked(scheduler, engine, PROMPTS[0], max_tokens=200)]
    asked[0].next()
    asked += [Asked(scheduler, engine, PROMPTS[1]) for _ in range(2)]
    with pytest.raises(QueueFullError) as refused:
        Asked(scheduler, engine, PROMPTS[2])
    assert 1 <= refused.value.retry_after <= 60
    assert all(one.text() for one in asked)


def test_cancelling_ends_within_a_token_and_frees_the_place(engine: Engine, start: Callable[..., Scheduler]) -> None:
    scheduler = start(running_max=1)
    running = Asked(scheduler, engine, PROMPTS[0], max_tokens=400)
    queued, last = Asked(scheduler, engine, PROMPTS[1]), Asked(scheduler, engine, PROMPTS[2])
    running.next()
    queued.ticket.cancel()
    running.ticket.cancel()
    made = running.ticket.tokens
    assert last.text() == alone_of(engine, scheduler, PROMPTS[2])
    assert running.ticket.tokens <= made + 1
    assert queued.came.empty()
    assert idle(scheduler)


def alone_of(engine: Engine, scheduler: Scheduler, prompt: str) -> str:
    scheduler.close(10)
    return alone(engine, prompt)


def test_time_runs_out_for_a_running_and_for_a_waiting_request(engine: Engine, start: Callable[..., Scheduler]) -> None:
    scheduler = start(running_max=1)
    slow = Asked(scheduler, engine, PROMPTS[0], seconds=0.6, max_tokens=1500, stop=("no such text",))
    waiting = Asked(scheduler, engine, PROMPTS[1], seconds=0.3)
    with pytest.raises(OutOfTimeError, match="waited too long"):
        waiting.next()
    slow.text()
    assert 0 < slow.ticket.tokens < 1500


def test_what_fits_nowhere_is_refused_and_the_others_go_on(engine: Engine, start: Callable[..., Scheduler]) -> None:
    scheduler = start()
    good = Asked(scheduler, engine, PROMPTS[0])
    with pytest.raises(InputError, match="the prompt has"):
        Asked(scheduler, engine, "word " * engine.context).text()
    assert good.text()


def test_requests_beyond_the_kv_cache_wait_for_room(engine: Engine, start: Callable[..., Scheduler]) -> None:
    scheduler = start(running_max=4)
    whole = engine.context - 600
    asked = [Asked(scheduler, engine, f"{number} {PROMPTS[0]}", max_tokens=whole, stop=(".",)) for number in range(4)]
    assert all(one.text() is not None for one in asked)
    assert idle(scheduler)


def test_closing_lets_admitted_requests_end_and_takes_no_new_ones(
    engine: Engine, start: Callable[..., Scheduler]
) -> None:
    scheduler = start(running_max=1)
    asked = [Asked(scheduler, engine, prompt) for prompt in PROMPTS]
    closing = threading.Thread(target=scheduler.close, args=(30,))
    closing.start()
    time.sleep(0.05)
    with pytest.raises(ClosingError):
        Asked(scheduler, engine, PROMPTS[0])
    assert all(one.text() for one in asked)
    closing.join(timeout=30)
    assert not closing.is_alive()


def test_closing_has_a_deadline(engine: Engine, start: Callable[..., Scheduler]) -> None:
    scheduler = start()
    asked = Asked(scheduler, engine, PROMPTS[0], max_tokens=1500, stop=("no such text",))
    asked.next()
    begun = time.monotonic()
    scheduler.close(0.2)
    assert time.monotonic() - begun < 10
    assert asked.ticket.tokens < 1500


@pytest.mark.parametrize("fault", [MemoryError("no room"), LogitsError("NaN")])
def test_a_failed_step_ends_its_replies_and_nothing_else(
    engine: Engine, start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    expected = alone(engine, PROMPTS[1])
    scheduler = start()
    step = Engine.step

    def failing(self: Engine, replies: list[object]) -> object:
        monkeypatch.setattr(Engine, "step", step)
        raise fault

    monkeypatch.setattr(Engine, "step", failing)
    with pytest.raises(type(fault)):
        Asked(scheduler, engine, PROMPTS[0]).next()
    assert Asked(scheduler, engine, PROMPTS[1]).text() == expected
    assert idle(scheduler)


def test_a_failed_step_leaves_nothing_for_later_prompts(
    engine: Engine, start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = start()
    long, step, steps = " ".join(PROMPTS * 20), Engine.step, list[int]()

    def failing(self: Engine, replies: list[Reply]) -> object:
        steps.append(1)
        if len(steps) == 2:
            raise MemoryError("no room")
        return step(self, replies)

    monkeypatch.setattr(Engine, "step", failing)
    with pytest.raises(MemoryError):
        Asked(scheduler, engine, long).text()
    again = Asked(scheduler, engine, long)
    again.text()
    assert again.ticket.cached_tokens == 0


@pytest.mark.parametrize("place", ["open", "cut"])
def test_a_fault_between_steps_reaches_its_request_and_nobody_else(
    engine: Engine, start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def failing(*_arguments: object) -> object:
        raise MemoryError("no room")

    scheduler = start()
    with monkeypatch.context() as patched:
        patched.setattr(Engine if place == "open" else Reply, place, failing)
        with pytest.raises(MemoryError):
            Asked(scheduler, engine, PROMPTS[0], seconds=0.5, max_tokens=1500, stop=("no such text",)).text()
    assert Asked(scheduler, engine, PROMPTS[1]).text() == alone_of(engine, scheduler, PROMPTS[1])


def test_what_is_held_is_handed_on_before_another_prompt(engine: Engine, start: Callable[..., Scheduler]) -> None:
    scheduler, flushed = start(), threading.Event()
    running = Asked(scheduler, engine, PROMPTS[0], max_tokens=400, stop=("no such text",))
    running.next()
    running.ticket.flush = flushed.set
    running.next()
    assert not flushed.is_set()
    Asked(scheduler, engine, PROMPTS[1]).next()
    assert flushed.is_set()
    running.ticket.cancel()


def test_a_receiver_that_fails_is_dropped(engine: Engine, start: Callable[..., Scheduler]) -> None:
    scheduler = start()

    def gone(_piece: Piece | Exception) -> None:
        raise RuntimeError("Event loop is closed")

    ticket = Ticket(Sampling(temperature=0, max_tokens=400), "a", 60, gone)
    scheduler.submit(ticket, engine.tokenizer.encode(PROMPTS[0]))
    assert Asked(scheduler, engine, PROMPTS[1]).text()
    assert idle(scheduler)
    assert ticket.tokens < 400
