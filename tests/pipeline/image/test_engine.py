"""A build through Docker's command line: what is sent to it, what it says, and how it fails."""

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.errors import InputError
from pipeline.image.engine import run_build

SAYS = r"""#!/bin/sh
[ "$DOCKER_BUILDKIT" = 1 ] || exit 9
cat >"$(dirname "$0")/sent"
cat <<'END'
#1 [internal] load build definition from Dockerfile
#5 [serve  1/12] FROM docker.io/library/python:3.11-slim
#5 [serve  1/12] FROM docker.io/library/python:3.11-slim
#6 [packages 2/6] RUN pip install
#6 1.234 Collecting everything
#7 [code 3/3] RUN compile
#7 CACHED
END
exit 0
"""
FAILS = """#!/bin/sh
echo '#6 [packages 2/6] RUN pip install'
echo '#6 ERROR: process "/bin/sh -c pip install" did not complete successfully: exit code: 1'
echo 'ERROR: failed to solve: no space left on device'
exit 1
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a docker command, the first to be found."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "docker"


def write(file: Path, script: str) -> None:
    file.write_text(script)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_the_context_is_sent_and_each_step_said_once(docker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(docker, SAYS)
    run_build(["docker", "build", "-"], iter([b"one", b"two"]), "building emerald:b")
    assert (docker.parent / "sent").read_bytes() == b"onetwo"
    assert capfd.readouterr().err.splitlines() == [
        "  [serve  1/12] FROM docker.io/library/python:3.11-slim",
        "  [packages 2/6] RUN pip install",
        "  [code 3/3] RUN compile",
        "  [code 3/3] has been done before",
    ]


def test_a_build_that_fails_says_its_last_lines_and_the_remedy(docker: Path) -> None:
    """Also when it ends before it has read the context."""

    def context() -> Iterator[bytes]:
        for _ in range(1000):
            yield bytes(1 << 16)

    write(docker, FAILS)
    with pytest.raises(InputError) as refused:
        run_build(["docker", "build", "-"], context(), "building emerald:b")
    assert "building emerald:b: the disk of the Docker engine is full" in str(refused.value)
    assert "did not complete successfully: exit code: 1" in str(refused.value)


def test_without_a_docker_command_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no docker command: install Docker's command line with its buildx plugin"):
        run_build(["docker", "build", "-"], iter([]), "building emerald:b")
