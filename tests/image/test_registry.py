"""From push to promotion and back, through a real engine and a real registry, and what happens when one fails."""

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from docker.models.images import Image

from pipeline.image.contents import platform_of
from tests.image.conftest import EMULATED, Registry, image_cli, log_in, registry_at
from tests.image.test_image import Change


@pytest.fixture(scope="module")
def digest(image: Image, registry: Registry) -> str:
    """The image's, pushed and not promoted."""
    ended = image_cli("push", str(image.id), registry.repository)
    assert ended.code == 0, ended.err
    assert " 0 were there" in ended.err
    return ended.out


@pytest.fixture(scope="module")
def verdict(digest: str, registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of verifying what the registry holds."""
    path = tmp_path_factory.mktemp("verdict") / "report.json"
    ended = image_cli("verify", f"{registry.repository}@{digest}", "--report", path, *EMULATED)
    assert ended.code == 0, ended.err
    return path


def test_push_is_under_a_candidates_tag_and_promotes_nothing(digest: str, registry: Registry) -> None:
    assert [name.startswith("candidate-") for name, found in registry.tags().items() if found == digest] == [True]


def test_second_push_sends_no_layer(image: Image, digest: str, registry: Registry) -> None:
    ended = image_cli("push", str(image.id), registry.repository)
    assert (ended.code, ended.out) == (0, digest)
    assert " 0 layers pushed" in ended.err


def test_verified_digest_is_promoted_and_taken_back(
    digest: str, verdict: Path, registry: Registry, changed: Change, tmp_path: Path
) -> None:
    """What was verified is what is promoted, whatever else is pushed in between."""
    (candidate,) = (name for name, found in registry.tags().items() if found == digest and name.startswith("candidate"))
    other = changed("ENV SECOND=1")
    pushed = image_cli("push", str(other.id), registry.repository, "--as", candidate)
    assert pushed.code == 0
    assert pushed.out != digest
    assert image_cli("promote", f"{registry.repository}@{pushed.out}", "both", "--verdict", verdict).code == 1
    assert "both" not in registry.tags()
    assert image_cli("promote", f"{registry.repository}@{digest}", "both", "--verdict", verdict).code == 0
    assert registry.tags()["both"] == digest
    report = tmp_path / "second.json"
    assert image_cli("verify", f"{registry.repository}@{pushed.out}", "--report", report, *EMULATED).code == 0
    assert image_cli("promote", f"{registry.repository}@{pushed.out}", "both", "--verdict", report).code == 0
    assert registry.tags()["both"] == pushed.out
    back = image_cli("rollback", registry.repository, "both")
    assert (back.code, back.out) == (0, digest)
    assert registry.tags()["both"] == digest


def test_promoted_tag_is_what_people_pull(
    client: docker.DockerClient, image: Image, digest: str, verdict: Path, registry: Registry
) -> None:
    assert image_cli("promote", f"{registry.repository}@{digest}", "latest", "--verdict", verdict).code == 0
    pulled = client.images.pull(registry.repository, tag="latest", platform=platform_of(image))
    assert pulled.id == image.id


@pytest.mark.parametrize(
    "gone", ["/emerald/licences/model/NOTICE", "/emerald/licences/embedder/LICENSE", "/emerald/MODEL_CARD.md"]
)
def test_missing_licence_notice_stops_the_push(registry: Registry, changed: Change, gone: str) -> None:
    before = registry.tags()
    ended = image_cli("push", str(changed(f"USER 0\nRUN rm {gone}\nUSER 10001:10001").id), registry.repository)
    assert (ended.code, ended.out) == (1, "")
    assert "licence gate" in ended.err
    assert registry.tags() == before


def test_wrong_password(image: Image, digest: str, verdict: Path, registry: Registry, tmp_path: Path) -> None:
    before = registry.tags()
    stranger = str(log_in(tmp_path / "docker", registry.port, "another word"))
    target = f"{registry.repository}@{digest}"
    for command in (
        ("push", str(image.id), registry.repository, "--as", "never"),
        ("promote", target, "never", "--verdict", verdict),
        ("rollback", registry.repository, "never"),
    ):
        ended = image_cli(*command, DOCKER_CONFIG=stranger)
        assert ended.code == 2
        assert "docker login" in ended.err
        assert "another word" not in ended.err + ended.out
    assert registry.tags() == before


def test_digest_that_is_not_there(registry: Registry, digest: str) -> None:
    ended = image_cli("verify", f"{registry.repository}@sha256:{'0' * 64}")
    assert ended.code == 2
    assert "the registry holds no such image" in " ".join(ended.err.split())


def test_registry_that_dies_during_a_push(image: Image, tmp_path: Path) -> None:
    """The engine tries again for a minute, and then says so."""
    with registry_at(tmp_path, password=False) as dying:

        def kill_at_first_bytes() -> None:
            uploads = dying.data / "docker/registry/v2/repositories/anne/emerald/_uploads"
            for _ in range(6000):
                if uploads.exists() and any(file.stat().st_size for file in uploads.glob("*/data")):
                    dying.kill()
                    return
                time.sleep(0.02)

        killer = threading.Thread(target=kill_at_first_bytes)
        killer.start()
        ended = image_cli("push", str(image.id), dying.repository)
        killer.join()
        assert dying.process.returncode is not None, "it was not killed"
        assert (ended.code, ended.out) == (2, "")
        assert "error: pushing" in ended.err
        assert dying.tags() == {}


def test_no_engine_says_so_and_what_is_left_out(tmp_path: Path) -> None:
    ended = image_cli("build", "--build", tmp_path, DOCKER_HOST=f"unix://{tmp_path}/docker.sock")
    assert ended.code == 2
    said = " ".join(ended.err.split())
    assert f"no Docker engine answers at unix://{tmp_path}/docker.sock" in said
    assert "everything up to the image is built without it" in said


@contextlib.contextmanager
def engine_on_a_small_disk(folder: Path) -> Iterator[str]:
    """The address of an engine whose data lies on 32 MB."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], check=True)
    with tempfile.TemporaryDirectory(dir="/run") as run:
        address = f"unix://{run}/docker.sock"
        command = ["dockerd", "--data-root", str(disk), "--exec-root", f"{run}/exec", "--pidfile", f"{run}/pid"]
        network = ["--bridge", "none", "--iptables=false", "--ip6tables=false"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([*command, "--host", address, *network], stdout=log, stderr=log)
        try:
            for _ in range(300):
                if Path(f"{run}/docker.sock").exists():
                    break
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)
            subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="starting an engine needs root")
def test_full_disk_of_the_engine(build: Path, tmp_path: Path, image: Image) -> None:
    with engine_on_a_small_disk(tmp_path) as address:
        base = ["--base", "never-reached", "--platform", platform_of(image)]  # what is to be built comes first
        ended = image_cli("build", "--build", build, "--tag", "emerald:never", *base, DOCKER_HOST=address)
    assert ended.code == 2
    said = " ".join(ended.err.split())
    assert "the disk of the Docker engine is full" in said
    assert "docker system prune" in said
