"""Promotion, its history and its refusals, against a registry that speaks Docker Hub's protocol."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.image.__main__ import main
from tests.pipeline.image.registry import NAME, PASSWORD, Hub, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.delenv("GITHUB_RUN_ID", raising=False)  # set where a workflow runs these tests
    with serving() as hub:
        yield hub


def log_in(hub: Hub, tmp_path: Path, password: str, **more: str) -> None:
    """As `docker login` writes it."""
    secret = base64.b64encode(f"{NAME}:{password}".encode()).decode()
    (tmp_path / "docker").mkdir()
    entry = {"auth": secret, **more}
    (tmp_path / "docker/config.json").write_text(json.dumps({"auths": {f"127.0.0.1:{hub.port}": entry}}))


def verdict(tmp_path: Path, digest: str, *, passed: bool = True, gate: str = "image") -> str:
    path = tmp_path / f"{digest[-8:]}-{passed}-{gate}.json"
    path.write_text(json.dumps({"gate": gate, "passed": passed, "digest": digest, "checks": []}))
    return str(path)


def promoted(hub: Hub, tmp_path: Path, text: str, tag: str = "latest") -> str:
    """Adds an image and promotes it; its digest."""
    digest = hub.add(text)
    assert main(["promote", f"{hub.repository}@{digest}", tag, "--verdict", verdict(tmp_path, digest)]) == 0
    return digest


def rollback(hub: Hub, *arguments: str) -> int:
    return main(["rollback", hub.repository, "latest", *arguments])


def test_promotion_moves_the_tag_and_pulls_nothing(hub: Hub, tmp_path: Path) -> None:
    digest = promoted(hub, tmp_path, "first")
    assert hub.tags["latest"] == digest
    assert hub.tags[f"latest-promoted-0001-{digest[7:19]}"] == digest
    assert not [line for line in hub.log if "/blobs/" in line]


def test_promoting_the_same_again_records_nothing(hub: Hub, tmp_path: Path) -> None:
    digest = promoted(hub, tmp_path, "first")
    tags = dict(hub.tags)
    assert main(["promote", f"{hub.repository}@{digest}", "latest"]) == 0
    assert hub.tags == tags


@pytest.mark.parametrize(
    ("about", "passed", "gate", "says"),
    [
        ("another", True, "image", "and sha256:"),
        ("it", False, "image", "does not say that an image passed"),
        ("it", True, "quality", "does not say that an image passed"),
        (None, True, "image", "give the report of its verification with --verdict"),
    ],
)
def test_without_a_fit_verdict_nothing_moves(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    about: str | None,
    passed: bool,
    gate: str,
    says: str,
) -> None:
    before = promoted(hub, tmp_path, "first")
    digest = hub.add("second")
    of = {"another": before, "it": digest, None: ""}[about]
    given = ["--verdict", verdict(tmp_path, of, passed=passed, gate=gate)] if about else []
    tags = dict(hub.tags)
    assert main(["promote", f"{hub.repository}@{digest}", "latest", *given]) == 1
    assert hub.tags == tags
    assert says in capsys.readouterr().err.replace("\n", " ")


def test_verdict_that_cannot_be_read(hub: Hub, tmp_path: Path) -> None:
    digest = hub.add("first")
    for content in ("", "[]", "{}", "null"):
        (tmp_path / "broken.json").write_text(content)
        assert (
            main(["promote", f"{hub.repository}@{digest}", "latest", "--verdict", str(tmp_path / "broken.json")]) == 2
        )
    assert "latest" not in hub.tags


@pytest.mark.parametrize("reference", ["{}:candidate", "{}", "{}@sha256:12", "UPPER@sha256:" + "0" * 64])
def test_only_a_digest_is_promoted(hub: Hub, tmp_path: Path, reference: str) -> None:
    digest = hub.add("first")
    image = reference.format(hub.repository)
    assert main(["promote", image, "latest", "--verdict", verdict(tmp_path, digest)]) == 2
    assert "latest" not in hub.tags


def test_a_registry_that_sends_other_bytes_is_not_trusted(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = hub.add("first")
    hub.blobs[digest] += b" "
    assert main(["promote", f"{hub.repository}@{digest}", "latest", "--verdict", verdict(tmp_path, digest)]) == 2
    assert "the registry sent other bytes" in capsys.readouterr().err
    assert "latest" not in hub.tags


def test_rollback_goes_back_one_by_one(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digests = [promoted(hub, tmp_path, text) for text in ("first", "second", "third")]
    capsys.readouterr()
    assert rollback(hub) == 0
    assert hub.tags["latest"] == digests[1]
    assert capsys.readouterr().out.strip() == digests[1]
    assert rollback(hub) == 0
    assert hub.tags["latest"] == digests[0]
    assert rollback(hub) == 2
    assert hub.tags["latest"] == digests[0]


def test_what_was_taken_back_is_not_returned_to(hub: Hub, tmp_path: Path) -> None:
    """first, second, bad; back to second; fourth. Before the fourth was the second, not the bad one."""
    digests = [promoted(hub, tmp_path, text) for text in ("first", "second", "bad")]
    assert rollback(hub) == 0
    promoted(hub, tmp_path, "fourth")
    assert rollback(hub) == 0
    assert hub.tags["latest"] == digests[1]


def test_rollback_to_any_recorded_digest_and_to_no_other(hub: Hub, tmp_path: Path) -> None:
    digests = [promoted(hub, tmp_path, text) for text in ("first", "second", "third")]
    assert rollback(hub, "--to", digests[0]) == 0
    assert hub.tags["latest"] == digests[0]
    assert rollback(hub, "--to", digests[2]) == 0
    assert hub.tags["latest"] == digests[2]
    unrecorded = hub.add("never promoted")
    assert rollback(hub, "--to", unrecorded) == 2
    assert hub.tags["latest"] == digests[2]


def test_a_tag_moved_by_hand_goes_back_to_its_record(hub: Hub, tmp_path: Path) -> None:
    digests = [promoted(hub, tmp_path, text) for text in ("first", "second")]
    hub.add("pushed by hand", tag="latest")
    assert rollback(hub) == 0
    assert hub.tags["latest"] == digests[1]


def test_a_record_that_was_moved_is_not_believed(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = promoted(hub, tmp_path, "first")
    second = promoted(hub, tmp_path, "second")
    hub.add("planted", tag=f"latest-promoted-0001-{first[7:19]}")
    assert rollback(hub) == 2
    assert hub.tags["latest"] == second
    assert "a record was moved" in capsys.readouterr().err.replace("\n", " ")


def test_histories_of_tags_are_apart(hub: Hub, tmp_path: Path) -> None:
    stable = promoted(hub, tmp_path, "first", tag="stable")
    promoted(hub, tmp_path, "second")
    assert rollback(hub) == 2
    assert hub.tags["stable"] == stable


def test_history_of_many_pages(hub: Hub, tmp_path: Path) -> None:
    hub.page = 2
    digests = [promoted(hub, tmp_path, f"number {number}") for number in range(5)]
    assert rollback(hub) == 0
    assert hub.tags["latest"] == digests[3]


@pytest.mark.parametrize("asks", ["basic", "bearer"])
def test_credentials_of_docker_login(hub: Hub, tmp_path: Path, asks: str) -> None:
    hub.asks = asks
    log_in(hub, tmp_path, PASSWORD)
    digest = promoted(hub, tmp_path, "first")
    assert hub.tags["latest"] == digest


def test_identity_token_of_a_credential_helper(hub: Hub, tmp_path: Path) -> None:
    hub.asks, hub.refresh_token = "bearer", "an identity"
    log_in(hub, tmp_path, "", identitytoken="an identity")
    digest = promoted(hub, tmp_path, "first")
    assert hub.tags["latest"] == digest


@pytest.mark.parametrize("asks", ["basic", "bearer"])
@pytest.mark.parametrize("password", ["wrong", None])
def test_refused_credentials_say_what_to_do(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], asks: str, password: str | None
) -> None:
    hub.asks = asks
    if password:
        log_in(hub, tmp_path, password)
    digest = hub.add("first")
    assert main(["promote", f"{hub.repository}@{digest}", "latest", "--verdict", verdict(tmp_path, digest)]) == 2
    said = capsys.readouterr().err
    assert f"docker login 127.0.0.1:{hub.port}" in said
    assert "wrong" not in said.replace(str(tmp_path), "")
    assert "latest" not in hub.tags


def test_a_registry_that_fails_at_the_tag_leaves_it(hub: Hub, tmp_path: Path) -> None:
    """The record is written first, so running again completes the promotion."""
    before = promoted(hub, tmp_path, "first")
    digest = hub.add("second")
    hub.fails_at = "manifests/latest"
    command = ["promote", f"{hub.repository}@{digest}", "latest", "--verdict", verdict(tmp_path, digest)]
    assert main(command) == 2
    assert hub.tags["latest"] == before
    hub.fails_at = ""
    assert main(command) == 0
    assert hub.tags["latest"] == digest
    assert rollback(hub) == 0
    assert hub.tags["latest"] == before


def test_no_registry_at_all(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hub.add("first")
    assert main(["promote", f"127.0.0.1:1/x@{digest}", "latest", "--verdict", verdict(tmp_path, digest)]) == 2
    assert "the registry does not answer" in capsys.readouterr().err
