"""The canary before there is an image: what it makes of a repository that the registry does not show."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.workflow.monitor import main
from tests.forge import THEIRS, TOKEN, Forge, artifact, forge_served
from tests.pipeline.image.registry import Hub, serving


@pytest.fixture
def forge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Forge]:
    with forge_served() as forge:
        for name, value in (("API_URL", forge.url), ("REPOSITORY", "oz/emerald"), ("TOKEN", TOKEN)):
            monkeypatch.setenv(f"GITHUB_{name}", value)
        yield forge


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    with serving() as hub:
        hub.asks, hub.open = "bearer", True
        yield hub


def check(hub: Hub, tmp_path: Path, name: str = "anne/none") -> int:
    report, summary = str(tmp_path / "canary.json"), str(tmp_path / "summary.md")
    return main(["check", f"127.0.0.1:{hub.port}/{name}:latest", "--report", report, "--summary", summary])


def test_before_anything_was_pushed_all_is_well(hub: Hub, forge: Forge, tmp_path: Path) -> None:
    """A pull request may keep what it likes, and so may other branches."""
    forge.artifacts = lambda: [artifact("verified", 3, by=THEIRS), artifact("verified", 4, branch="work")]
    assert check(hub, tmp_path) == 0
    assert (tmp_path / "summary.md").read_text().startswith("Nothing was promoted to `127.0.0.1:")
    assert main(["tell", str(tmp_path / "canary.json")]) == 0
    assert forge.issues == []


def test_a_repository_that_was_pushed_to_and_is_not_shown_is_trouble(
    hub: Hub, forge: Forge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge.artifacts = lambda: [artifact("verified", 3)]
    assert check(hub, tmp_path) == 2
    assert "does not exist yet, or is private" in capsys.readouterr().err


def test_where_github_cannot_be_asked_it_is_trouble(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)
    assert check(hub, tmp_path) == 2
    assert "does not exist yet, or is private" in capsys.readouterr().err


def test_a_tag_that_never_was_needs_no_forge(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)
    assert check(hub, tmp_path, "anne/emerald") == 0


def test_a_tag_that_is_gone_is_trouble(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hub.add("first")
    hub.tags[f"latest-promoted-0001-{digest[7:19]}-r100"] = digest
    assert check(hub, tmp_path, "anne/emerald") == 2
    assert "the tag is gone" in capsys.readouterr().err


def test_pulling_what_was_never_promoted_gives_later_steps_nothing(hub: Hub, forge: Forge, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert main(["pull", f"127.0.0.1:{hub.port}/anne/none:latest", "--github-output", str(output)]) == 0
    assert not output.exists()
