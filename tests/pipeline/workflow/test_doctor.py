"""What a machine, a fork, its variables and its credentials lack: each told with the value and the remedy."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.cpu import COMPILER_FLAGS, family
from pipeline.configs import named_config
from pipeline.workflow.doctor import __main__ as doctor
from pipeline.workflow.doctor import access, machine
from pipeline.workflow.doctor.__main__ import main
from pipeline.workflow.doctor.access import UncheckedError, ask, credentials
from pipeline.workflow.doctor.findings import ok, table
from pipeline.workflow.doctor.variables import CHECKS
from pipeline.workflow.plan import VARIABLES
from pipeline.workflow.probe import NEEDS, Needs
from tests.conftest import ROOT
from tests.pipeline.workflow.doctor_servers import Reply, Site, push_token, served

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]

NOWHERE = "http://127.0.0.1:9"
WELL = "0 errors, 0 warnings"
OURS = ("GITHUB_", "HAS_", "HF_", "DOCKER", "EMERALD_", "AWS_")
"""How the variables begin that the doctor looks at."""
DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
FORK = "/repos/dorothy/emerald"
MODEL = "/api/models/meta-llama/Llama-3.1-8B-Instruct/revision/0e9e39f249a16976918f6564b8830bc894c89659"
FILE = "/meta-llama/Llama-3.1-8B-Instruct/resolve/0e9e39f249a16976918f6564b8830bc894c89659/config.json"


@pytest.fixture(autouse=True)
def healthy(monkeypatch: Patch, tmp_path: Path) -> Path:
    """A machine that lacks nothing, with none of our variables set; the folder that comes first in PATH."""
    for name in os.environ:
        if name.startswith(OURS) or name == "XDG_CACHE_HOME":
            monkeypatch.delenv(name)
    commands, include = tmp_path / "commands", tmp_path / "include"
    include.mkdir()
    (include / "Python.h").touch()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler is not None
    for name, value in (("CXX", compiler), ("HOME", str(tmp_path)), ("NO_PROXY", "*"), ("no_proxy", "*")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(include))
    for configuration in NEEDS:
        monkeypatch.setitem(NEEDS, configuration, Needs(memory_gb=0, disk_gb=0))
    for name in ("GITHUB_API_URL", "HF_ENDPOINT"):  # no test asks a server elsewhere
        monkeypatch.setenv(name, NOWHERE)
    monkeypatch.setattr(access, "HUB_REGISTRY", NOWHERE)
    write_docker(commands)
    return commands


@pytest.fixture
def site() -> Iterator[Site]:
    """A server that knows nothing yet."""
    with served() as server:
        yield server


def write_command(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder / name


def write_docker(folder: Path, *, client: str = "28.0.4", engine: str = "28.0.4", buildx: bool = True) -> None:
    """A client that says what Docker's does; without an engine it fails as Docker's does."""
    no_engine = "" if engine else "echo Cannot connect to the Docker daemon >&2; exit 1"
    script = f'if [ "$1" = buildx ]; then exit {0 if buildx else 1}; fi\necho "{client} {engine}"\n{no_engine}'
    write_command(folder, "docker", script)


def told(capsys: Capture, *arguments: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    code = main(arguments)
    return code, capsys.readouterr().out


def test_a_machine_that_lacks_nothing(capsys: Capture) -> None:
    code, output = told(capsys)
    assert code == 0
    assert WELL in output
    for thing in ("Python", "system", "C++ compiler", "Python's headers", "machine", "Docker's engine"):
        assert f"ok       {thing}: " in output


def test_it_needs_no_package_and_an_old_python_can_read_it() -> None:
    """It runs before anything is installed, and says of a Python that is too old that it is."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import pipeline.workflow.doctor.__main__ as doctor\n"
        "assert 'pipeline.configs' not in sys.modules\n"
        "sys.exit(doctor.main(['--set', 'export.cpu=power9']))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "power9" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("changed", [{"OLDEST": (3, 99)}, {"NEWEST": (3, 10)}])
def test_a_python_out_of_range(monkeypatch: Patch, capsys: Capture, changed: dict[str, tuple[int, int]]) -> None:
    for name, version in changed.items():
        monkeypatch.setattr(doctor, name, version)
    code, output = told(capsys)
    assert code == 2
    assert "error    Python: " in output
    assert "make setup PYTHON=" in output
    assert ("system" in output) == ("NEWEST" in changed)  # an old one looks no further


def test_a_python_without_venv(monkeypatch: Patch, capsys: Capture, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(doctor, "VENV", tmp_path / "none")
    code, output = told(capsys)
    assert code == 2
    assert "apt-get install python3-venv" in output


@pytest.mark.parametrize(
    ("function", "value", "names"),
    [
        ("system", "Darwin", "Darwin on "),
        ("machine", "armv7l", "Linux on armv7l"),
        ("libc_ver", ("", ""), "without glibc"),
    ],
)
def test_another_system(monkeypatch: Patch, capsys: Capture, function: str, value: object, names: str) -> None:
    monkeypatch.setattr(f"platform.{function}", lambda: value)
    code, output = told(capsys)
    assert code == 2
    assert "error    system: " in output
    assert names in output
    assert "compiler" not in output  # nothing else could be looked at there


def test_no_compiler(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, output = told(capsys)
    assert code == 2
    assert "error    C++ compiler: no no-such-compiler" in output


def test_a_compiler_that_does_not_know_the_processor(monkeypatch: Patch, capsys: Capture, healthy: Path) -> None:
    old = write_command(healthy, "old-compiler", 'echo "bad value: $1" >&2; exit 1')
    monkeypatch.setenv("CXX", str(old))
    code, output = told(capsys)
    assert code == 2
    assert f"fails: bad value: {COMPILER_FLAGS[family()][0]}\n" in output
    assert "g++ 11" in output


def test_pythons_headers_are_missing(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "include/Python.h").unlink()
    code, output = told(capsys)
    assert code == 0
    assert "warning  Python's headers: no Python.h" in output
    assert "apt-get install python3-dev" in output


@pytest.mark.parametrize("needs", [Needs(memory_gb=1e6, disk_gb=0), Needs(memory_gb=0, disk_gb=1e6)])
def test_too_small_a_machine(monkeypatch: Patch, capsys: Capture, needs: Needs) -> None:
    monkeypatch.setitem(NEEDS, "embedded", needs)
    code, output = told(capsys)
    assert code == 2
    assert "1e+06 GB of" in output


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("power9", "no program can be compiled for power9"),
        ("aarch64" if family().startswith("x86") else "x86-64-v3", "it cannot run programs for"),
    ],
)
def test_the_processor_is_judged_by_the_configuration(capsys: Capture, target: str, names: str) -> None:
    code, output = told(capsys, "--set", f"export.cpu={target}")
    assert code == 2
    assert names in output
    assert "ok       C++ compiler" in output  # not to blame


def test_needs_are_those_of_the_configuration(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setitem(NEEDS, "llama31-8b", Needs(memory_gb=1e6, disk_gb=0))
    assert "1e+06 GB of memory" in told(capsys, "--config", "llama31-8b")[1]
    assert "1e+06 GB of memory" not in told(capsys)[1]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [(["--config", "gpt"], "no configuration 'gpt'"), (["--set", "quantize.bits=3"], "no field 'bits'")],
)
def test_a_configuration_that_does_not_exist(capsys: Capture, arguments: list[str], names: str) -> None:
    code, output = told(capsys, *arguments)
    assert code == 2
    assert names in output
    assert "ok       machine" in output


def test_no_docker(monkeypatch: Patch, capsys: Capture, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "include"))
    findings = list(machine.docker())
    assert [(finding.level, finding.found) for finding in findings] == [("warning", "no docker command")]


@pytest.mark.parametrize(
    ("client", "engine", "buildx", "code", "names"),
    [
        ("28.0.4", "", True, 0, "warning  Docker's engine: none answers: Cannot connect to the Docker daemon"),
        ("20.10.24+dfsg1", "20.10.24+dfsg1", False, 0, WELL),
        ("20.10.24", "19.03.8", True, 2, "error    Docker's engine: 19.03.8"),
        ("28.0.4", "28.0.4", False, 0, "warning  Docker's buildx: missing from client 28.0.4"),
        ("dev", "dev", False, 0, WELL),
    ],
)
def test_docker(capsys: Capture, healthy: Path, client: str, engine: str, buildx: bool, code: int, names: str) -> None:
    write_docker(healthy, client=client, engine=engine, buildx=buildx)
    found, output = told(capsys)
    assert found == code
    assert names in output


def test_docker_that_hangs(monkeypatch: Patch, capsys: Capture, healthy: Path) -> None:
    monkeypatch.setattr(machine, "SECONDS", 3.0)  # for every command, on the slowest of machines
    write_command(healthy, "docker", "exec sleep 60")
    code, output = told(capsys)
    assert code == 0
    assert "docker does not answer (TimeoutExpired)" in output


def fork(monkeypatch: Patch, site: Site, repository: Reply | None = None, workflows: Reply | None = None) -> None:
    """A fork on this site, and what GitHub says of it."""
    described = {"full_name": "dorothy/emerald", "has_issues": True, "private": False, "archived": False}
    monkeypatch.setenv("GITHUB_REPOSITORY", "dorothy/emerald")
    monkeypatch.setenv("GITHUB_TOKEN", "token-of-the-run")
    monkeypatch.setenv("GITHUB_API_URL", site.url)
    site.replies |= {FORK: repository or Reply(200, described), f"{FORK}/actions/workflows": workflows or states()}


def states(monitor: str = "active", other: str = "active") -> Reply:
    """Two workflows of ours and one that GitHub adds."""
    rows = [
        {"name": "monitor", "path": ".github/workflows/monitor.yml", "state": monitor},
        {"name": "pipeline", "path": ".github/workflows/pipeline.yml", "state": "active"},
        {"name": "pages-build-deployment", "path": "dynamic/pages/pages-build-deployment", "state": other},
    ]
    return Reply(200, {"total_count": len(rows), "workflows": rows})


def test_a_fork_that_lacks_nothing(monkeypatch: Patch, capsys: Capture, site: Site) -> None:
    fork(monkeypatch, site)
    code, output = told(capsys)
    assert code == 0
    assert WELL in output
    assert "ok       repository dorothy/emerald: found, public" in output
    assert "ok       workflows: GitHub knows 2 of the" in output
    assert set(site.asked.values()) == {"Bearer token-of-the-run"}


def test_without_a_token_github_is_not_asked(monkeypatch: Patch, capsys: Capture, site: Site) -> None:
    fork(monkeypatch, site)
    monkeypatch.delenv("GITHUB_TOKEN")
    assert WELL in told(capsys)[1]
    assert not site.asked


@pytest.mark.parametrize(
    ("described", "code", "names"),
    [
        ({"has_issues": False}, 0, "issues are switched off"),
        ({"private": True}, 0, "attestations are off"),
        ({"archived": True}, 2, "error    repository dorothy/emerald: it is archived"),
        ({"disabled": True}, 2, "GitHub has disabled it"),
    ],
)
def test_settings_of_a_fork(
    monkeypatch: Patch, capsys: Capture, site: Site, described: dict[str, bool], code: int, names: str
) -> None:
    fork(monkeypatch, site, Reply(200, {"full_name": "dorothy/emerald", **described}))
    found, output = told(capsys)
    assert found == code
    assert names in output
    assert WELL not in output


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ("disabled_fork", "scheduled workflows off in a new fork"),
        ("disabled_inactivity", "60 days without activity"),
        ("disabled_manually", "somebody switched it off"),
        ("deleted", "it does not run"),
    ],
)
def test_a_workflow_that_is_switched_off(
    monkeypatch: Patch, capsys: Capture, site: Site, state: str, names: str
) -> None:
    fork(monkeypatch, site, workflows=states(state))
    code, output = told(capsys)
    assert code == 0
    assert f"warning  workflow monitor: {state}" in output
    assert names in output
    assert "choose monitor, then Enable workflow" in output


def test_a_workflow_that_is_not_ours_may_be_off(monkeypatch: Patch, capsys: Capture, site: Site) -> None:
    fork(monkeypatch, site, workflows=states(other="disabled_manually"))
    assert WELL in told(capsys)[1]


@pytest.mark.parametrize(
    ("repository", "workflows", "names"),
    [
        (None, Reply(403), "give the job `permissions: actions: read`"),
        (
            Reply(401),
            None,
            "warning  repository: not checked: GitHub answers 401",
        ),
        (Reply(502), None, "GitHub answers 502"),
        (Reply(200, b"<html>Sign in</html>"), None, "no JSON object"),
        (Reply(200, []), None, "see whether a proxy answers"),
    ],
)
def test_what_github_refuses_is_a_warning(
    monkeypatch: Patch, capsys: Capture, site: Site, repository: Reply | None, workflows: Reply | None, names: str
) -> None:
    fork(monkeypatch, site, repository, workflows)
    code, output = told(capsys)
    assert code == 0
    assert names in output
    assert "0 errors, 1 warning" in output


@pytest.mark.parametrize("url", [NOWHERE, "api.github.com"])
def test_a_github_that_cannot_be_reached_is_a_warning(
    monkeypatch: Patch, capsys: Capture, site: Site, url: str
) -> None:
    fork(monkeypatch, site)
    monkeypatch.setenv("GITHUB_API_URL", url)
    code, output = told(capsys)
    assert code == 0
    assert "0 errors, 2 warnings" in output
    assert "not checked: " in output


def test_a_server_that_hangs_is_not_waited_for(monkeypatch: Patch) -> None:
    monkeypatch.setattr(access, "SECONDS", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(UncheckedError, match=r"timed out|TimeoutError"),
    ):
        ask(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_credentials_are_not_taken_to_another_server(site: Site) -> None:
    with served({"/there": Reply()}) as other:
        site.replies["/away"] = Reply(302, headers={"Location": f"{other.url}/there"})
        site.replies["/renamed"] = Reply(301, headers={"Location": "/here"})
        site.replies["/here"] = Reply()
        assert ask(f"{site.url}/away", "Bearer secret").status == 200
        assert ask(f"{site.url}/renamed", "Bearer secret").status == 200
        assert other.asked == {"/there": None}
        assert site.asked["/here"] == "Bearer secret"


def test_what_is_no_web_address_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    with pytest.raises(UncheckedError, match="is no address"):
        ask((tmp_path / "file").as_uri())


def test_a_fault_does_not_show_the_token(site: Site) -> None:
    with pytest.raises(UncheckedError) as fault:
        ask(site.url, "Bearer sec\nret")
    assert "sec" not in str(fault.value)


def test_every_variable_of_a_plan_is_looked_at() -> None:
    assert set(VARIABLES) <= set(CHECKS)


RIGHT = {
    "DOCKERHUB_USERNAME": ["dorothy", "Dorothy1"],
    "EMERALD_IMAGE": ["docker.io/oz/emerald", "oz/emerald", "127.0.0.1:5000/oz/emerald", "ghcr.io/oz/city/emerald"],
    "EMERALD_CONFIG": ["embedded", "llama31-8b"],
    "EMERALD_SETTINGS": ["certify_cache.risk=0.01", " gate_latency.repetitions=9; quantize.scheme=int4-channel\n", ";"],
    "EMERALD_CPU": ["native", *COMPILER_FLAGS],
    "EMERALD_ATTEST": ["true", "false"],
    "EMERALD_SIGN": ["true", "false"],
    "EMERALD_ARTIFACT_GB": ["50", "0.5"],
    "AWS_ROLE": ["arn:aws:iam::123456789012:role/emerald", "arn:aws-us-gov:iam::123456789012:role/oz/emerald"],
    "AWS_REGION": ["us-east-1", "ap-southeast-2", "us-gov-west-1"],
    "EMERALD_API_KEYS": ["public", DIGEST, f"{DIGEST}, {DIGEST}"],
}


def test_every_variable_has_a_right_value_here() -> None:
    assert RIGHT.keys() == CHECKS.keys()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RIGHT.items() for value in values])
def test_a_variable_that_is_right(monkeypatch: Patch, capsys: Capture, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    code, output = told(capsys)
    assert code == 0
    assert f"ok       variable {name}: " in output


MISTAKES = [
    ("DOCKERHUB_USERNAME", " dorothy", "white space around it"),
    ("DOCKERHUB_USERNAME", "dorothy\n", "white space around it"),
    ("DOCKERHUB_USERNAME", '"dorothy"', "quotes around it"),
    ("DOCKERHUB_USERNAME", "doro\nthy", "a line break inside"),
    ("DOCKERHUB_USERNAME", "https://hub.docker.com/u/dorothy", "this is an address, and the account's name is asked"),
    ("DOCKERHUB_USERNAME", "https://hub.docker.com/u/dorothy/", "write dorothy"),
    ("DOCKERHUB_USERNAME", "@dorothy", "write it without the @: dorothy"),
    ("DOCKERHUB_USERNAME", "dorothy@kansas.example", "this is an e-mail address"),
    ("DOCKERHUB_USERNAME", "dorothy gale", "no account's name"),
    ("EMERALD_IMAGE", "https://ghcr.io/oz/emerald", "write ghcr.io/oz/emerald"),
    ("EMERALD_IMAGE", "ghcr.io/Oz/Emerald", "write ghcr.io/oz/emerald"),
    ("EMERALD_IMAGE", "docker.io/oz/emerald:latest", "write docker.io/oz/emerald"),
    ("EMERALD_IMAGE", f"localhost:5000/oz/emerald@sha256:{DIGEST}", "write localhost:5000/oz/emerald"),
    ("EMERALD_IMAGE", "https://hub.docker.com/r/oz/emerald", "write docker.io/oz/emerald"),
    ("EMERALD_IMAGE", "hub.docker.com/r/oz/emerald", "write docker.io/oz/emerald"),
    ("EMERALD_IMAGE", "emerald", "expected REGISTRY/NAMESPACE/NAME"),
    ("EMERALD_IMAGE", "docker.io/emerald", "expected REGISTRY/NAMESPACE/NAME"),
    ("EMERALD_IMAGE", "'oz/emerald'", "quotes around it"),
    ("EMERALD_IMAGE", ' "oz/emerald" ', "white space around it"),
    ("EMERALD_CONFIG", "Embedded", "write embedded"),
    ("EMERALD_CONFIG", "llama31_8B", "write llama31-8b"),
    ("EMERALD_CONFIG", "gpt", "write one of embedded, llama31-8b"),
    ("EMERALD_CONFIG", "embedded ", "white space around it"),
    ("EMERALD_SETTINGS", "quantize.bits=3", "no field 'bits'"),
    ("EMERALD_SETTINGS", "certify_cache.risk", "expected STAGE.FIELD=VALUE"),
    ("EMERALD_SETTINGS", "certify_cache.risk=2", "expected a number from 0 to 1"),
    ("EMERALD_SETTINGS", "certify_cache.risk=0.01;\ngate_latency.repetitions=9", "a line break inside"),
    ("EMERALD_CPU", "Native", "write native"),
    ("EMERALD_CPU", "NATIVE", "write native"),
    ("EMERALD_CPU", "x86_64-v3", "write x86-64-v3"),
    ("EMERALD_CPU", "arm64", "write aarch64"),
    ("EMERALD_CPU", "graviton", "write one of native, x86-64-v4+vnni"),
    ("EMERALD_ATTEST", "True", "write true"),
    ("EMERALD_SIGN", "yes", "write one of true, false"),
    ("EMERALD_ARTIFACT_GB", "50 GB", "expected a number of GB"),
    ("AWS_ROLE", "emerald", "arn:aws:iam::123456789012:role/NAME"),
    ("AWS_ROLE", "arn:aws:iam::123456789012:user/dorothy", "expected the ARN of a role"),
    ("AWS_REGION", "us-east-1a", "write us-east-1"),
    ("AWS_REGION", "N. Virginia", "such as us-east-1"),
    ("EMERALD_API_KEYS", DIGEST.upper(), f"write {DIGEST}"),
    ("EMERALD_API_KEYS", f"{DIGEST}  -", f"write {DIGEST}"),
    ("EMERALD_API_KEYS", f"SHA2-256(stdin)= {DIGEST}", f"write {DIGEST}"),
    ("EMERALD_API_KEYS", f"{DIGEST},open-sesame", "key 2 is no SHA-256"),
    ("EMERALD_API_KEYS", "Public", "write public, in small letters"),
    ("EMERALD_API_KEYS", f"{DIGEST},public", "write public, in small letters and alone"),
    ("EMERALD_API_KEYS", f"{DIGEST}\n{DIGEST}", "a line break inside"),
]
HARMLESS = ("AWS_ROLE", "AWS_REGION", "EMERALD_API_KEYS", "EMERALD_ATTEST", "EMERALD_SIGN")
"""Variables that the build itself does not use."""


@pytest.mark.parametrize(("name", "value", "names"), MISTAKES)
def test_a_mistaken_variable(monkeypatch: Patch, capsys: Capture, name: str, value: str, names: str) -> None:
    monkeypatch.setenv(name, value)
    code, output = told(capsys)
    assert code == (0 if name in HARMLESS else 2)
    assert f"{'warning' if name in HARMLESS else 'error'}".ljust(9) + f"variable {name}: " in output
    assert names in output


@pytest.mark.parametrize("token", ["dckr_pat_kansas", f"ghp_{'k' * 36}", f"hf_{'k' * 34}", "AKIAABCDEFGHIJKLMNOP"])
def test_a_token_in_a_variable_is_not_shown(monkeypatch: Patch, capsys: Capture, token: str) -> None:
    monkeypatch.setenv("DOCKERHUB_USERNAME", token)
    code, output = told(capsys)
    assert code == 2
    assert "it holds an access token" in output
    assert token not in output


def test_an_api_key_is_not_shown(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("EMERALD_API_KEYS", " open-sesame ")
    assert "sesame" not in told(capsys)[1]


def test_settings_are_those_of_the_repositorys_configuration(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("EMERALD_CONFIG", "llama31-8b")
    monkeypatch.setenv("EMERALD_SETTINGS", "quantize.calibration_tokens=4096")
    assert WELL in told(capsys)[1]


def test_other_registries_have_other_user_names(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("EMERALD_IMAGE", "registry.kansas.example/oz/emerald")
    monkeypatch.setenv("DOCKERHUB_USERNAME", "dorothy@kansas.example")
    assert WELL in told(capsys)[1]


def test_where_nothing_is_pushed_a_mistaken_name_stops_nothing(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("EMERALD_IMAGE", "oz/Emerald")
    monkeypatch.setenv("HAS_DOCKERHUB_TOKEN", "false")
    code, output = told(capsys)
    assert code == 0
    assert "warning  variable EMERALD_IMAGE" in output


@pytest.mark.parametrize(
    ("token", "user", "names"),
    [
        ("true", "", "variable DOCKERHUB_USERNAME: not set"),
        ("false", "dorothy", "secret DOCKERHUB_TOKEN: not set"),
        ("true", "dorothy", WELL),
        ("false", "", WELL),
        ("", "dorothy", WELL),
    ],
)
def test_half_of_the_credentials(monkeypatch: Patch, capsys: Capture, token: str, user: str, names: str) -> None:
    monkeypatch.setenv("HAS_DOCKERHUB_TOKEN", token)
    monkeypatch.setenv("DOCKERHUB_USERNAME", user)
    code, output = told(capsys)
    assert code == 0
    assert names in output
    assert ("nothing will be pushed" in output) == (names != WELL)


def log_in(folder: Path, address: str, login: str = "dorothy:secret") -> None:
    """What `docker login` leaves."""
    (folder / ".docker").mkdir(exist_ok=True)
    auths = {"other.example": {}, address: {"auth": base64.b64encode(login.encode()).decode()}}
    (folder / ".docker/config.json").write_text(json.dumps({"auths": auths}))


BASIC = "Basic " + base64.b64encode(b"dorothy:secret").decode()


def registry(site: Site, token: Reply) -> None:
    """A registry that sends its clients to a token server, which gives this."""
    challenge = f'Bearer realm="{site.url}/token",service="registry.example"'
    site.replies |= {"/v2/": Reply(401, headers={"WWW-Authenticate": challenge}), "/token": token}


@pytest.mark.parametrize(
    ("token", "code", "names"),
    [
        (push_token("oz/emerald", "pull", "push"), 0, WELL),
        (push_token("oz/emerald", "*"), 0, WELL),
        (Reply(200, {"access_token": "opaque"}), 0, WELL),
        (Reply(200, {"token": "not.a.jwt"}), 0, WELL),
        (push_token("oz/emerald", "pull"), 2, "the token of 'dorothy' may only read (pull allowed)"),
        (push_token("oz/emerald"), 2, "(nothing allowed)"),
        (push_token("oz/other", "pull", "push"), 2, "the account may not write to 'oz'"),
        (Reply(401, {"details": "access token has insufficient scopes"}), 2, "make one with Read & Write"),
        (
            Reply(401, {"details": "incorrect username or password"}),
            2,
            "refuses the user 'dorothy' with this token (401)",
        ),
        (Reply(503), 0, "not checked: "),
    ],
)
def test_whether_the_image_may_be_pushed(
    monkeypatch: Patch, capsys: Capture, tmp_path: Path, site: Site, token: Reply, code: int, names: str
) -> None:
    registry(site, token)
    log_in(tmp_path, site.host)
    monkeypatch.setenv("EMERALD_IMAGE", f"{site.host}/oz/emerald")
    found, output = told(capsys)
    assert found == code
    assert names in output
    assert f"push to {site.host}/oz/emerald: " in output
    scope = "/token?service=registry.example&scope=repository%3Aoz%2Femerald%3Apull%2Cpush"
    assert site.asked[scope] == BASIC


def test_docker_hub_has_three_names(monkeypatch: Patch, capsys: Capture, tmp_path: Path, site: Site) -> None:
    registry(site, push_token("dorothy/emerald", "pull"))
    log_in(tmp_path, "https://index.docker.io/v1/")
    monkeypatch.setattr(access, "HUB_REGISTRY", site.url)
    monkeypatch.setenv("DOCKERHUB_USERNAME", "Dorothy")
    code, output = told(capsys)
    assert code == 2
    assert "push to docker.io/dorothy/emerald: the token of 'dorothy' may only read" in output


@pytest.mark.parametrize(("password", "code"), [("secret", 0), ("wrong", 2)])
def test_a_registry_that_asks_for_a_password(
    monkeypatch: Patch, capsys: Capture, tmp_path: Path, site: Site, password: str, code: int
) -> None:
    site.admits, site.replies = BASIC, {"/v2/": Reply()}
    log_in(tmp_path, site.host, f"dorothy:{password}")
    monkeypatch.setenv("EMERALD_IMAGE", f"{site.host}/oz/emerald")
    found, output = told(capsys)
    assert found == code
    assert f"push to {site.host}/oz/emerald: " in output


def test_without_a_login_no_registry_is_asked(monkeypatch: Patch, capsys: Capture, site: Site) -> None:
    monkeypatch.setenv("EMERALD_IMAGE", f"{site.host}/oz/emerald")
    assert WELL in told(capsys)[1]
    assert not site.asked


def test_a_login_that_cannot_be_read(monkeypatch: Patch, capsys: Capture, tmp_path: Path, site: Site) -> None:
    (tmp_path / "config.json").write_text("{")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("EMERALD_IMAGE", f"{site.host}/oz/emerald")
    code, output = told(capsys)
    assert code == 0
    assert "run docker login again" in output


def test_the_workflows_own_token_comes_before_any_login(tmp_path: Path) -> None:
    environment = {"DOCKER_CONFIG": str(tmp_path), "DOCKERHUB_USERNAME": "anne", "DOCKERHUB_TOKEN": "a token"}
    assert credentials(environment, "docker.io") == ("anne", "a token")
    assert credentials({**environment, "DOCKERHUB_TOKEN": ""}, "docker.io") is None


def test_a_login_that_a_helper_keeps(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auths": {"ghcr.io": {}}, "credsStore": "pass"}')
    assert credentials({"DOCKER_CONFIG": str(tmp_path)}, "ghcr.io") is None


def hub(monkeypatch: Patch, site: Site, described: Reply | None = None, file: Reply | None = None) -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")  # huggingface_hub forgives this, too
    site.replies |= {MODEL: described or Reply(), FILE: file or Reply()}


GATED = Reply(403, headers={"X-Error-Code": "GatedRepo"})


@pytest.mark.parametrize(
    ("described", "file", "code", "names"),
    [
        (Reply(), Reply(), 0, WELL),
        (Reply(401), None, 2, "HF_TOKEN is wrong or has expired"),
        (Reply(403), None, 2, "ask for access at"),
        (Reply(), GATED, 2, "ask for access at"),  # its description is public
        (Reply(404), None, 2, "no such model, or it has no revision 0e9e39f"),
        (Reply(401, headers={"X-Error-Code": "RepoNotFound"}), None, 2, "no such model"),
        (Reply(500), None, 0, "not checked: the hub answers 500"),
    ],
)
def test_whether_the_model_may_be_read(
    monkeypatch: Patch, capsys: Capture, site: Site, described: Reply, file: Reply | None, code: int, names: str
) -> None:
    hub(monkeypatch, site, described, file)
    found, output = told(capsys, "--config", "llama31-8b")
    assert found == code
    assert names in output
    assert set(site.asked.values()) == {"Bearer hf_secret"}
    assert "hf_secret" not in output


@pytest.mark.parametrize(
    ("file", "secret", "code", "names"),
    [
        (Reply(401, headers={"X-Error-Code": "GatedRepo"}), "", 2, "HF_TOKEN is not set"),
        (Reply(401, headers={"X-Error-Code": "GatedRepo"}), "true", 0, "the secret HF_TOKEN is set"),
        (Reply(), "", 0, "everybody may read it"),
        (Reply(), "false", 2, "as a secret (Settings, Secrets and variables, Actions)"),  # the plan asks for one
    ],
)
def test_a_model_without_a_token(
    monkeypatch: Patch, capsys: Capture, site: Site, file: Reply, secret: str, code: int, names: str
) -> None:
    hub(monkeypatch, site, file=file)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HAS_HF_TOKEN", secret)
    found, output = told(capsys, "--config", "llama31-8b")
    assert found == code
    assert names in output


def test_a_hub_that_cannot_be_reached_is_no_excuse_for_a_missing_token(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    code, output = told(capsys, "--config", "llama31-8b")
    assert code == 2
    assert f"ask for access at {NOWHERE}/meta-llama/Llama-3.1-8B-Instruct" in output


def test_offline_no_hub_is_asked(monkeypatch: Patch, capsys: Capture, site: Site) -> None:
    hub(monkeypatch, site)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, output = told(capsys, "--config", "llama31-8b")
    assert code == 0
    assert "it has to be in the local cache" in output
    assert not site.asked


@pytest.mark.parametrize("variable", ["HOME", "HF_HOME", "HF_TOKEN_PATH"])
def test_a_token_that_a_login_has_kept(
    monkeypatch: Patch, capsys: Capture, site: Site, tmp_path: Path, variable: str
) -> None:
    hub(monkeypatch, site)
    monkeypatch.delenv("HF_TOKEN")
    place = {"HOME": tmp_path / "home/.cache/huggingface/token", "HF_HOME": tmp_path / "home/token"}
    file = place.get(variable, tmp_path / "home")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("hf_kept\n")
    monkeypatch.setenv(variable, str(tmp_path / "home"))
    assert told(capsys, "--config", "llama31-8b")[0] == 0
    assert site.asked[MODEL] == "Bearer hf_kept"


def test_a_source_without_a_commit(capsys: Capture) -> None:
    code, output = told(capsys, "--set", "fetch.source=hub:oz/storyteller@main")
    assert code == 2
    assert "error    fetch.source: 'hub:oz/storyteller@main'" in output


def test_a_model_from_a_package_asks_no_hub(monkeypatch: Patch, capsys: Capture, site: Site) -> None:
    assert named_config("embedded").fetch.source.startswith("package:")
    hub(monkeypatch, site)
    assert WELL in told(capsys)[1]
    assert not site.asked


def test_annotations_and_summary_of_a_run(monkeypatch: Patch, capsys: Capture, tmp_path: Path) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    monkeypatch.setenv("EMERALD_CPU", "Nat|ive%")
    monkeypatch.setenv("AWS_ROLE", "emerald")
    (tmp_path / "summary").write_text("before\n")
    code, output = told(capsys)
    assert code == 2
    assert "::error::variable EMERALD_CPU: 'Nat|ive%25'; no such CPU family: write native\n" in output
    assert "::warning::variable AWS_ROLE: 'emerald'; " in output
    assert output.index("ok       system") < output.index("warning  variable") < output.index("error    variable")
    summary = (tmp_path / "summary").read_text(encoding="utf-8")
    assert summary.startswith("before\n## Doctor\n\n1 error, 1 warning: ")
    assert "| ❌ | variable EMERALD_CPU | 'Nat\\|ive%' | no such CPU family: write native |\n" in summary
    assert "| ⚠️ | variable AWS_ROLE | 'emerald' | " in summary
    assert "| ✅ | system | " in summary


def test_outside_a_workflow_there_are_no_annotations(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("EMERALD_CPU", "Native")
    assert "::" not in told(capsys)[1]


def test_a_table_keeps_its_rows() -> None:
    assert "| ✅ | a | b c | &lt;d\\|> |\n" in table([ok("a", "b\nc")._replace(remedy="<d|>")])


def test_help_teaches(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes: 0 " in text
    for name in CHECKS:
        assert name in text
