"""A registry's limits, its bad moments, and what it does not show to strangers."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from model.errors import InputError
from pipeline.image.registry import Backoff, Registry, Repository, RepositoryUnavailableError
from tests.pipeline.image.registry import HANG_UP, NAME, PASSWORD, Hub, serving
from tests.pipeline.image.test_promotion import log_in

QUICK = Backoff(first_seconds=0.01, total_seconds=0.05)
"""Pauses of 10, 20 and 20 ms: four attempts."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    with serving() as hub:
        yield hub


def registry(hub: Hub, backoff: Backoff = QUICK, name: str = "anne/emerald") -> Registry:
    return Registry(Repository.parse(f"127.0.0.1:{hub.port}/{name}"), backoff)


@pytest.mark.parametrize("fault", [429, 502, 503, 504, HANG_UP])
def test_a_busy_registry_is_asked_again(hub: Hub, fault: int, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hub.add("first")
    hub.faults = [fault, fault]
    assert registry(hub).digest_of("candidate") == digest
    assert len(hub.log) == 3
    assert "trying again in" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [429, 503, HANG_UP])
def test_a_tag_is_set_in_spite_of_faults(hub: Hub, fault: int) -> None:
    digest = hub.add("first")
    manifest = registry(hub).manifest(digest)
    hub.faults = [fault, fault]
    registry(hub).tag(manifest, "latest")
    assert hub.tags["latest"] == digest


def test_the_token_server_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.asks, digest = "bearer", hub.add("first")
    log_in(hub, tmp_path, PASSWORD)

    @contextmanager
    def busy_after_the_first(_port: int) -> Iterator[None]:
        yield
        if len(hub.log) == 1:
            hub.faults = [429, HANG_UP]

    hub.around = busy_after_the_first
    assert registry(hub).digest_of("candidate") == digest
    assert [line.split()[1] for line in hub.log[1:4]] == ["/token"] * 3


def test_patience_ends_and_says_what_raises_the_limit(hub: Hub) -> None:
    hub.faults = [429] * 10
    with pytest.raises(InputError, match=rf"answered 429.*try again later, or docker login 127\.0\.0\.1:{hub.port}"):
        registry(hub).digest_of("candidate")
    assert len(hub.log) == 4


def test_a_registry_that_stays_away_is_no_matter_of_limits(hub: Hub) -> None:
    hub.faults = [503] * 10
    with pytest.raises(InputError, match="answered 503") as raised:
        registry(hub).digest_of("candidate")
    assert "docker login" not in str(raised.value)


def test_a_registry_that_always_hangs_up(hub: Hub) -> None:
    hub.faults = [HANG_UP] * 10
    with pytest.raises(InputError, match="the registry does not answer"):
        registry(hub).digest_of("candidate")
    assert len(hub.log) == 4


def test_an_error_of_its_own_is_not_repeated(hub: Hub) -> None:
    hub.faults = [500]
    with pytest.raises(InputError, match="answered 500"):
        registry(hub).digest_of("candidate")
    assert len(hub.log) == 1


def test_the_pause_is_as_long_as_the_registry_asks(hub: Hub) -> None:
    digest = hub.add("first")
    hub.faults, hub.retry_after = [429], "1"
    begun = time.monotonic()
    assert registry(hub, Backoff(first_seconds=0.01, total_seconds=5)).digest_of("candidate") == digest
    assert time.monotonic() - begun >= 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_longer_pause_than_patience_is_told_at_once(hub: Hub, form: str) -> None:
    later = datetime.now(UTC) + timedelta(hours=2)
    hub.faults, hub.retry_after = [429], "7200" if form == "seconds" else format_datetime(later, usegmt=True)
    with pytest.raises(InputError, match=rf"try again {later:%Y-%m-%d %H}:\d\d UTC, as it asks, or docker login"):
        registry(hub, Backoff()).digest_of("candidate")
    assert len(hub.log) == 1


@pytest.mark.parametrize("header", ["soon", "-5", "0"])
def test_a_pause_that_cannot_be_read_is_our_own(hub: Hub, header: str) -> None:
    digest = hub.add("first")
    hub.faults, hub.retry_after = [429, 429], header
    assert registry(hub).digest_of("candidate") == digest


def test_strangers_read_what_is_there(hub: Hub) -> None:
    hub.asks, hub.open = "bearer", True
    digest = hub.add("first")
    asked = registry(hub)
    assert asked.digest_of("candidate") == digest
    assert asked.digest_of("latest") is None
    assert list(asked.tags()) == ["candidate"]


@pytest.mark.parametrize("ask", [lambda one: one.digest_of("latest"), lambda one: list(one.tags())])
def test_a_repository_that_is_not_shown(hub: Hub, ask: Callable[[Registry], object]) -> None:
    """As Docker Hub does it, which gives a token and then does not take it."""
    hub.asks, hub.open = "bearer", True
    with pytest.raises(RepositoryUnavailableError, match="does not exist yet, or is private and cannot be read"):
        ask(registry(hub, name="anne/none"))


def test_a_token_server_that_gives_strangers_none(hub: Hub) -> None:
    """As GitHub's registry does it."""
    hub.asks = "bearer"
    with pytest.raises(RepositoryUnavailableError, match=r"docker login 127\.0\.0\.1"):
        registry(hub).digest_of("latest")


def test_strangers_may_not_write(hub: Hub) -> None:
    hub.asks, hub.open = "bearer", True
    manifest = registry(hub).manifest(hub.add("first"))
    with pytest.raises(InputError, match="the registry refused") as raised:
        registry(hub).tag(manifest, "latest")
    assert not isinstance(raised.value, RepositoryUnavailableError)


def test_a_wrong_password_is_no_missing_repository(hub: Hub, tmp_path: Path) -> None:
    hub.asks = "bearer"
    log_in(hub, tmp_path, "wrong")
    with pytest.raises(InputError, match="the registry refused") as raised:
        registry(hub).digest_of("latest")
    assert not isinstance(raised.value, RepositoryUnavailableError)
    assert NAME not in str(raised.value).replace("anne/emerald", "")
