"""The order of promotions: whatever order requests and runs come in, the newest run's digest is what the tag names."""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from threading import Condition

import pytest

from pipeline.image.__main__ import main
from pipeline.image.promotion import Outcome, history, promote, rollback
from pipeline.image.registry import Registry, Repository
from tests.pipeline.image.registry import Hub, serving
from tests.pipeline.image.test_promotion import verdict


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.delenv("GITHUB_RUN_ID", raising=False)
    with serving() as hub:
        yield hub


def registry(hub: Hub) -> Registry:
    return Registry(Repository.parse(hub.repository))


def promoted(hub: Hub, tmp_path: Path, text: str, run: int | None) -> Outcome:
    """Adds an image and promotes it as that run."""
    digest = hub.add(text, tag=f"candidate-{text}")
    return promote(registry(hub), digest, "latest", Path(verdict(tmp_path, digest)), run)


def digest_of(hub: Hub, text: str) -> str:
    return hub.tags[f"candidate-{text}"]


def records(hub: Hub) -> list[str]:
    return sorted(tag.removeprefix("latest-") for tag in hub.tags if tag.startswith("latest-"))


def test_record_ends_with_its_run(hub: Hub, tmp_path: Path) -> None:
    outcome = promoted(hub, tmp_path, "first", 12345678901)
    digest = digest_of(hub, "first")
    assert outcome == Outcome(digest=digest)
    assert records(hub) == [f"promoted-0001-{digest[7:19]}-r12345678901"]


def test_an_older_run_replaces_nothing(hub: Hub, tmp_path: Path) -> None:
    promoted(hub, tmp_path, "new", 200)
    before = dict(hub.tags)
    outcome = promoted(hub, tmp_path, "old", 100)
    assert (outcome.digest, outcome.faults) == (digest_of(hub, "new"), ())
    assert outcome.superseded_by is not None
    assert outcome.superseded_by.run == 200
    assert hub.tags == {**before, "candidate-old": digest_of(hub, "old")}


def test_a_verdict_that_does_not_fit_is_a_fault_of_an_older_run_too(hub: Hub, tmp_path: Path) -> None:
    promoted(hub, tmp_path, "new", 200)
    outcome = promote(registry(hub), hub.add("old"), "latest", None, 100)
    assert "was never promoted" in outcome.faults[0]
    assert outcome.superseded_by is None


def test_by_hand_no_order_is_asked_and_newer_runs_follow(hub: Hub, tmp_path: Path) -> None:
    promoted(hub, tmp_path, "new", 200)
    assert promoted(hub, tmp_path, "by-hand", None) == Outcome(digest=digest_of(hub, "by-hand"))
    assert promoted(hub, tmp_path, "old", 100).superseded_by is not None
    assert hub.tags["latest"] == digest_of(hub, "by-hand")
    promoted(hub, tmp_path, "newer", 201)
    assert hub.tags["latest"] == digest_of(hub, "newer")
    assert rollback(registry(hub), "latest", None, 202) == digest_of(hub, "by-hand")
    assert rollback(registry(hub), "latest", None, 203) == digest_of(hub, "new")


def test_a_repeated_run_promotes_again_and_records_nothing_twice(hub: Hub, tmp_path: Path) -> None:
    promoted(hub, tmp_path, "first", 100)
    before = records(hub)
    promoted(hub, tmp_path, "first", 100)
    assert records(hub) == before
    assert promoted(hub, tmp_path, "rebuilt", 100).superseded_by is None
    assert hub.tags["latest"] == digest_of(hub, "rebuilt")


def test_a_revert_that_overtakes_what_it_reverts(hub: Hub, tmp_path: Path) -> None:
    """A, then B, then A again: the last run ends before the second, finds its digest there, and must still count."""
    promoted(hub, tmp_path, "a", 100)
    assert promoted(hub, tmp_path, "a", 300).superseded_by is None
    assert promoted(hub, tmp_path, "b", 200).superseded_by is not None
    assert hub.tags["latest"] == digest_of(hub, "a")


def test_a_revert_in_order_is_rolled_back_to_what_it_reverted(hub: Hub, tmp_path: Path) -> None:
    for text, run in (("a", 100), ("b", 200), ("a", 300)):
        promoted(hub, tmp_path, text, run)
    assert rollback(registry(hub), "latest", None, 400) == digest_of(hub, "b")


def test_the_same_digest_twice_is_one_step_back(hub: Hub, tmp_path: Path) -> None:
    for text, run in (("a", 100), ("b", 200), ("b", 300)):
        promoted(hub, tmp_path, text, run)
    assert rollback(registry(hub), "latest", None, 400) == digest_of(hub, "a")


def test_after_a_rollback_no_older_run_promotes(hub: Hub, tmp_path: Path) -> None:
    promoted(hub, tmp_path, "first", 100)
    promoted(hub, tmp_path, "bad", 200)
    assert rollback(registry(hub), "latest", None, 300) == digest_of(hub, "first")
    assert records(hub)[-1].endswith("-r300")
    assert promoted(hub, tmp_path, "between", 250).superseded_by is not None
    assert hub.tags["latest"] == digest_of(hub, "first")
    assert promoted(hub, tmp_path, "mended", 301).superseded_by is None


def test_keeping_what_is_there_is_recorded_too(hub: Hub, tmp_path: Path) -> None:
    promoted(hub, tmp_path, "good", 100)
    assert rollback(registry(hub), "latest", digest_of(hub, "good"), 300) == digest_of(hub, "good")
    assert promoted(hub, tmp_path, "between", 200).superseded_by is not None


def test_a_rollback_that_waited_is_carried_out_although_newer_runs_have_promoted(hub: Hub, tmp_path: Path) -> None:
    promoted(hub, tmp_path, "first", 100)
    promoted(hub, tmp_path, "bad", 300)
    assert rollback(registry(hub), "latest", None, 200) == digest_of(hub, "first")
    assert hub.tags["latest"] == digest_of(hub, "first")
    assert promoted(hub, tmp_path, "between", 250).superseded_by is not None
    assert promoted(hub, tmp_path, "mended", 301).superseded_by is None
    assert rollback(registry(hub), "latest", None, 302) == digest_of(hub, "first")


def test_records_of_before_runs_were_recorded_come_first(hub: Hub, tmp_path: Path) -> None:
    texts = ("first", "second", "third")
    for number, text in enumerate(texts, start=1):
        digest = hub.add(text, tag=f"candidate-{text}")
        hub.tags[f"latest-promoted-{number:04}-{digest[7:19]}"] = digest
    hub.tags["latest"] = digest_of(hub, "third")
    promoted(hub, tmp_path, "fourth", 100)
    found = history(registry(hub), "latest")
    assert [entry.digest for entry in found] == [digest_of(hub, text) for text in (*texts, "fourth")]
    assert [(entry.number, entry.run) for entry in found] == [(1, 0), (2, 0), (3, 0), (4, 100)]
    for text in reversed(texts):
        assert rollback(registry(hub), "latest", None, 200) == digest_of(hub, text)


def test_known_records_are_not_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    for run in range(100, 105):
        promoted(hub, tmp_path, f"number-{run}", run)
    hub.log.clear()
    promoted(hub, tmp_path, "last", 200)
    asked = [line for line in hub.log if line.startswith("HEAD") and "-promoted-" in line]
    assert len(asked) == len(set(asked)) == 6


def run_before(hub: Hub, request: int, act: Callable[[], object]) -> Callable[[], bool]:
    """The act happens before the request of that number, counted from now; whether it did is asked in the end."""
    left = [request]

    @contextmanager
    def around(_port: int) -> Iterator[None]:
        left[0] -= 1
        if left[0] == -1:
            act()
        yield

    hub.around = around
    return lambda: left[0] < 0


def mixed(
    hub: Hub, begin: Callable[[], object], outer: Callable[[], object], inner: Callable[[], object]
) -> Iterator[int]:
    """From the same beginning again and again, the outer act with the inner one before each of its requests in turn."""
    for request in count():
        hub.around = Hub().around
        hub.tags.clear()
        begin()
        acted = run_before(hub, request, inner)
        outer()
        if not acted():
            assert request > 5, "what moves a tag asks more than that"
            return
        yield request


@pytest.mark.parametrize(("outer", "inner"), [(100, 200), (200, 100)])
def test_a_promotion_between_any_two_requests_of_another(hub: Hub, tmp_path: Path, outer: int, inner: int) -> None:
    outcomes: dict[int, Outcome] = {}

    def act(run: int) -> Callable[[], None]:
        return lambda: outcomes.update({run: promoted(hub, tmp_path, f"run-{run}", run)})

    for request in mixed(hub, lambda: promoted(hub, tmp_path, "before", 50), act(outer), act(inner)):
        assert hub.tags["latest"] == digest_of(hub, "run-200"), f"before request {request}"
        assert outcomes[200] == Outcome(digest=digest_of(hub, "run-200"))


def test_a_promotion_by_hand_between_any_two_requests_of_another(hub: Hub, tmp_path: Path) -> None:
    """Either may win, and both end at the same."""
    outcomes: dict[int | None, Outcome] = {}

    def act(run: int | None) -> Callable[[], None]:
        return lambda: outcomes.update({run: promoted(hub, tmp_path, f"run-{run}", run)})

    for request in mixed(hub, lambda: promoted(hub, tmp_path, "before", 50), act(None), act(200)):
        assert hub.tags["latest"] == history(registry(hub), "latest")[-1].digest, f"before request {request}"
        assert outcomes[None].digest == hub.tags["latest"]


def test_a_rollback_between_any_two_requests_of_an_older_promotion(hub: Hub, tmp_path: Path) -> None:
    def begin() -> None:
        for text, run in (("before", 50), ("bad", 60)):
            promoted(hub, tmp_path, text, run)

    def roll_back() -> None:
        rollback(registry(hub), "latest", digest_of(hub, "before"), 200)

    for request in mixed(hub, begin, lambda: promoted(hub, tmp_path, "older", 100), roll_back):
        assert hub.tags["latest"] == digest_of(hub, "before"), f"before request {request}"


class Turns:
    """Lets one request through at a time, of the clients that wait, in an order that the seed gives."""

    def __init__(self, ports: Sequence[int], seed: int) -> None:
        self._changed = Condition()
        self._running = set(ports)
        self._waiting: set[int] = set()
        self._turn: int | None = None
        self._random = random.Random(seed)

    @contextmanager
    def around(self, port: int) -> Iterator[None]:
        with self._changed:
            self._waiting.add(port)
            self._choose()
            assert self._changed.wait_for(lambda: self._turn == port, timeout=30)
            self._waiting.remove(port)
        yield
        with self._changed:
            self._turn = None
            self._choose()

    def leave(self, port: int) -> None:
        with self._changed:
            self._running.remove(port)
            self._choose()

    def _choose(self) -> None:
        if self._turn is None and self._waiting == self._running and self._running:
            self._turn = self._random.choice(sorted(self._waiting))
            self._changed.notify_all()


@pytest.mark.parametrize("seed", range(15))
def test_three_at_once_end_at_the_newest_run(hub: Hub, tmp_path: Path, seed: int) -> None:
    """Two promotions and a rollback, with their requests mixed; the one started last is the newest run."""
    before = promoted(hub, tmp_path, "before", 50).digest
    promoted(hub, tmp_path, "bad", 60)
    digests = {run: hub.add(f"run {run}") for run in (100, 200)}
    with ExitStack() as stack:
        places = [stack.enter_context(serving(hub)).repository for _ in range(3)]
        ports = [int(place.partition(":")[2].partition("/")[0]) for place in places]
        turns = Turns(ports, seed)
        hub.around = turns.around
        rollback_run = random.Random(seed).choice([70, 150, 250])

        def act(place: str, port: int, run: int) -> object:
            try:
                at = Registry(Repository.parse(place))
                if run == rollback_run:
                    return rollback(at, "latest", before, run)
                return promote(at, digests[run], "latest", Path(verdict(tmp_path, digests[run])), run)
            finally:
                turns.leave(port)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(act, places, ports, (100, 200, rollback_run)))
        hub.around = Hub().around
        last = history(Registry(Repository.parse(places[0])), "latest")[-1]
    assert hub.tags["latest"] == last.digest
    assert last.digest in ({digests[200], before} if rollback_run < 200 else {before})


def test_command_line_tells_of_what_is_newer(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = hub.add("new"), hub.add("old")

    def run(digest: str, *more: str) -> tuple[int, str, str]:
        code = main(["promote", f"{hub.repository}@{digest}", "latest", "--verdict", verdict(tmp_path, digest), *more])
        return (code, *capsys.readouterr())

    monkeypatch.setenv("GITHUB_RUN_ID", "200")
    assert run(new)[:2] == (0, f"{new}\n")
    code, out, err = run(old, "--run", "100")
    assert (code, out) == (0, f"{new}\n")
    assert f"not promoted: run 100 is older than run 200, which promoted {new}; roll back" in err
    monkeypatch.setenv("GITHUB_RUN_ID", "300")
    assert run(old)[:2] == (0, f"{old}\n")
    assert main(["rollback", hub.repository, "latest", "--run", "400"]) == 0
    assert capsys.readouterr().out == f"{new}\n"
    assert [tag.rpartition("-")[2] for tag in records(hub)] == ["r200", "r300", "r400"]


@pytest.mark.parametrize("given", ["0", "-1", "12a", "٣"])
def test_command_line_refuses_what_is_no_run(hub: Hub, capsys: pytest.CaptureFixture[str], given: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["rollback", hub.repository, "latest", f"--run={given}"])
    assert ended.value.code == 2
    assert "GITHUB_RUN_ID" in capsys.readouterr().err
