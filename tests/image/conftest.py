"""A real engine, a real registry, and an image of the project's own build; engine.sh runs these tests."""

import base64
import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import docker
import pytest
from docker.models.images import Image

from pipeline.image.contents import platform_of
from tests.conftest import ROOT
from tests.serving.server import free_port

ARGUMENTS = shlex.split(os.environ.get("EMERALD_IMAGE_ARGUMENTS", ""))
"""What building an image needs on this machine."""
EMULATED = ["--emulated", os.environ["EMERALD_IMAGE_CPUINFO"]] if "EMERALD_IMAGE_CPUINFO" in os.environ else []
"""What verifying one needs, where its architecture is emulated."""
NAME, PASSWORD = "anne", "secret word"
HTPASSWD = "anne:$2y$05$abcdefghijklmnopqrstuu1C7yeI3ZG3Jm.nHdnKkGJg1xTYKP9Oy"
"""That password, by bcrypt, as htpasswd writes it."""
PATIENCE = 3600
"""Seconds after which a command counts as hung; an emulated machine packs and compiles for many minutes."""


class Ended(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str


def image_cli(*arguments: str | Path, **environment: str) -> Ended:
    """Runs `python -m pipeline.image`."""
    return run_module("pipeline.image", *arguments, **environment)


def run_module(module: str, *arguments: str | Path, **environment: str) -> Ended:
    """Runs `python -m MODULE`."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    print(done.stderr, file=sys.stderr)
    return Ended(done.returncode, done.stdout.strip(), done.stderr)


@pytest.fixture(scope="session")
def build(request: pytest.FixtureRequest) -> Path:
    """The build folder that images are made of: EMERALD_IMAGE_BUILD, or the project's own."""
    given = os.environ.get("EMERALD_IMAGE_BUILD")
    return ROOT / given if given else Path(request.getfixturevalue("embedded_build"))


@pytest.fixture(scope="session")
def client() -> Iterator[docker.DockerClient]:
    """The engine."""
    engine = docker.from_env(timeout=PATIENCE)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def image(client: docker.DockerClient, build: Path) -> Image:
    """The image, built by the command line."""
    ended = image_cli("build", "--build", build, "--tag", "emerald:tested", *ARGUMENTS)
    assert ended.code == 0, ended.err
    return client.images.get(ended.out)


@pytest.fixture
def changed(client: docker.DockerClient, image: Image) -> Iterator[Callable[[str], Image]]:
    """Makes the image with more lines of Dockerfile, and removes it after the test."""
    made: list[str] = []

    def change(lines: str) -> Image:
        dockerfile = f"FROM {image.id}\n{lines}\n".encode()
        context = io.BytesIO()
        with tarfile.open(fileobj=context, mode="w") as archive:
            info = tarfile.TarInfo("Dockerfile")
            info.size = len(dockerfile)
            archive.addfile(info, io.BytesIO(dockerfile))
        context.seek(0)
        built, _ = client.images.build(
            fileobj=context, custom_context=True, platform=platform_of(image), rm=True, forcerm=True
        )
        made.append(str(built.id))
        return built

    yield change
    for name in made:
        client.images.remove(name, force=True)


@dataclass
class Registry:
    """Debian's docker-registry on loopback."""

    port: int
    data: Path
    process: "subprocess.Popen[bytes]"

    @property
    def repository(self) -> str:
        return f"127.0.0.1:{self.port}/anne/emerald"

    def tags(self) -> dict[str, str]:
        """{tag: digest}, as its disk has them."""
        folder = self.data / "docker/registry/v2/repositories/anne/emerald/_manifests/tags"
        return {tag.name: (tag / "current/link").read_text() for tag in folder.iterdir()} if folder.exists() else {}

    def kill(self) -> None:
        """As a machine that dies."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def registry_at(folder: Path, *, password: bool) -> Iterator[Registry]:
    """A registry with its data there, empty at first; killed in the end."""
    port = free_port()
    config: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    if password:
        (folder / "htpasswd").write_text(HTPASSWD + "\n")
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    (folder / "config.json").write_text(json.dumps(config))
    program = shutil.which("docker-registry")
    assert program is not None, "run under tests/image/engine.sh, which installs it"
    process = subprocess.Popen([program, "serve", str(folder / "config.json")])
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                with contextlib.suppress(urllib.error.HTTPError):  # it asks for a password, so it serves
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5).close()
                break
            time.sleep(0.05)
        yield Registry(port, folder / "data", process)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One that asks for a password, which `docker login` would have left in this session's configuration."""
    folder = tmp_path_factory.mktemp("registry")
    with registry_at(folder, password=True) as served, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_CONFIG", str(log_in(folder / "docker", served.port, PASSWORD)))
        yield served


def log_in(folder: Path, port: int, password: str) -> Path:
    """As `docker login` leaves it."""
    folder.mkdir()
    secret = base64.b64encode(f"{NAME}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {f"127.0.0.1:{port}": {"auth": secret}}}))
    return folder
