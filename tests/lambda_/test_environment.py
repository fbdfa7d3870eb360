"""What Lambda does to a process: a short init, snapshots that are restored many times, nothing beside the image."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serving.websocket import allowance
from tests.conftest import ROOT
from tests.lambda_ import events
from tests.lambda_.management import Management

RESTORED = """
import json, os, random, uuid, torch
import serving.lambda_handler as entry
from awslambdaric import lambda_runtime_hooks_runner as hooks
from model.sampling import Sampler, Sampling

def drawn():
    reply = Sampler(Sampling(temperature=1.0))
    return {
        "random": random.random(),
        "torch": torch.rand(()).item(),
        "reply": [reply.next_token(torch.zeros(50_000)) for _ in range(4)],
        "uuid": uuid.uuid4().hex,
    }

def restored(runs_hooks):
    reading, writing = os.pipe()
    if os.fork() == 0:
        random.setstate(state)  # which Python seeds anew in a fork, and not in a restored snapshot
        if runs_hooks:
            hooks.run_after_restore()
        os.write(writing, json.dumps(drawn()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return json.load(pipe)

hooks.run_before_snapshot()
state = random.getstate()
print(json.dumps({"loaded": entry.ENVIRONMENT._begun.result().progress,
                  "without": [restored(False), restored(False)], "with": [restored(True), restored(True)]}))
"""
"""Forks are what restored snapshots are: processes that go on from one state."""

LIGHT = """
import sys, threading
threading.Thread.start = lambda thread: None  # what Lambda's init waits for is only what the import itself does
import serving.lambda_handler
heavy = {"torch", "numpy", "faiss", "fastapi", "pydantic", "tokenizers", "mangum"} & set(sys.modules)
assert not heavy, heavy
"""

STARTING = """
import json, sys, threading
start = threading.Thread.start
threading.Thread.start = lambda thread: None if thread.name == "begin" else start(thread)
import serving.lambda_handler as entry

class Context:
    def get_remaining_time_in_millis(self):
        return 6_000

print(json.dumps(entry.handler(json.loads(sys.argv[1]), Context())))
assert "torch" not in sys.modules
"""
"""A process whose imports never end."""

WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Missing())
import {module}
"""


def run(code: str, build: Path, *arguments: str, **variables: str) -> str:
    """What a Python of its own prints."""
    environment = {"EMERALD_BUILD": str(build), "PATH": "/usr/bin:/bin", "AWS_REGION": "us-east-1", **variables}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_restored_snapshots_draw_different_numbers(embedded_build: Path) -> None:
    found = json.loads(run(RESTORED, embedded_build))
    assert found["loaded"] == 1.0, "a snapshot is taken of a model that is ready"
    one, other = found["without"]
    assert (one["random"], one["torch"]) == (other["random"], other["torch"]), "or there is nothing to mend"
    assert one["reply"] != other["reply"] and one["uuid"] != other["uuid"], "these come from the operating system"
    one, other = found["with"]
    assert all(one[name] != other[name] for name in one)


def test_no_snapshot_is_taken_of_a_model_that_cannot_load(tmp_path: Path) -> None:
    code = "import serving.lambda_handler as entry\ntry:\n    entry.ENVIRONMENT.settle()\nexcept Exception as fault:\n"
    assert "cannot be loaded" in run(f"{code}    print(fault)", tmp_path)


def test_init_imports_nothing_heavy(tmp_path: Path) -> None:
    run(LIGHT, tmp_path)


def test_the_prologue_needs_nothing_heavy(embedded_build: Path, management: Management) -> None:
    variables = {
        "AWS_ENDPOINT_URL_APIGATEWAYMANAGEMENTAPI": management.url,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "example",
    }
    run(STARTING, embedded_build, json.dumps(events.prologue("starting")), **variables)
    frames = management.received("starting")
    kinds, scenes = [frame["type"] for frame in frames], frames[0]["scenes"]
    assert kinds[: 1 + scenes] == ["prologue", *["scene"] * scenes]
    assert (frames[-1]["type"], frames[-1]["status"], frames[-1]["retry_after"]) == ("error", 503, 1)


def test_a_server_that_is_still_starting_says_when_to_come_back(tmp_path: Path) -> None:
    answer = json.loads(run(STARTING, tmp_path, json.dumps(events.http("GET", "/v1/models"))))
    assert (answer["statusCode"], answer["headers"]["retry-after"]) == (503, "1")


def test_what_was_waited_is_taken_from_the_answers_time(tmp_path: Path) -> None:
    code = (
        LIGHT
        + """
from serving.lambda_handler import _settings
from serving.settings import Settings
through_url = {"domainName": "x.lambda-url.us-east-1.on.aws"}
asked = [({}, 26.9), ({}, 7.2), ({}, 0), (through_url, 7)]
print([float(_settings(Settings(), around, left).reply_seconds) for around, left in asked])
"""
    )
    assert json.loads(run(code, tmp_path)) == [26.0, 7.0, 1.0, 300.0]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("serving.app, serving.listener", ("boto3", "botocore", "mangum", "awslambdaric", "snapshot_restore_py")),
        ("serving.lambda_handler", ("samcli", "cfnlint", "airspeed", "boto3", "pytest", "yaml")),
    ],
)
def test_each_server_needs_its_own_packages_alone(module: str, absent: tuple[str, ...], tmp_path: Path) -> None:
    run(WITHOUT.format(module=module, absent=absent), tmp_path)


def test_an_answer_that_is_awaited_ends_before_api_gateway_gives_up() -> None:
    assert allowance(300, 900_000, awaited=True) < 29
    assert allowance(300, 900_000, awaited=False) == 300
    assert allowance(300, 60_000, awaited=False) < 60
    assert allowance(5, 900_000, awaited=True) == 5
    assert allowance(300, 1_000, awaited=False) == 0
