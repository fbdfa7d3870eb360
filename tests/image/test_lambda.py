"""The image for AWS Lambda: verified like the other, and started as Lambda starts it, by AWS's emulator inside it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.models.containers import Container
from docker.models.images import Image

from pipeline.image.contents import platform_of
from tests.image.conftest import ARGUMENTS, EMULATED, image_cli
from tests.lambda_ import events
from tests.lambda_.emulator import binary

INVOKE = """
import http.client, sys
function = http.client.HTTPConnection("127.0.0.1", 8080, timeout=120)
function.request("POST", "/2015-03-31/functions/function/invocations", sys.argv[1])
print(function.getresponse().read().decode())
"""
ACCOUNT = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "example", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def lambda_image(client: docker.DockerClient, build: Path) -> Image:
    ended = image_cli("build", "--build", build, "--target", "lambda", "--tag", "emerald:lambda-tested", *ARGUMENTS)
    assert ended.code == 0, ended.err
    return client.images.get(ended.out)


@pytest.fixture
def function(client: docker.DockerClient, lambda_image: Image) -> Iterator[Container]:
    """A running container without network, of whose files only /tmp can be written, as in Lambda."""
    container = client.containers.run(
        lambda_image,
        lambda_image.attrs["Config"]["Cmd"],
        entrypoint=["/emulator"],
        environment={**ACCOUNT, "AWS_LAMBDA_FUNCTION_TIMEOUT": "120"},
        volumes=[f"{binary()}:/emulator:ro"],
        platform=platform_of(lambda_image),
        network_mode="none",
        read_only=True,
        tmpfs={"/tmp": ""},
        detach=True,
    )
    yield container
    container.remove(v=True, force=True)


def invoke(container: Container, event: object) -> dict[str, Any]:
    """The function's answer, asked from inside as soon as the emulator listens."""
    said: object = None
    for _ in range(100):
        code, said = container.exec_run(["python", "-c", INVOKE, json.dumps(event)])
        if code == 0 and isinstance(said, bytes):
            answer: dict[str, Any] = json.loads(said)
            return answer
        time.sleep(0.2)
    raise AssertionError(f"{said!r}\n{container.logs().decode()}")


def test_it_is_fit_to_be_shown(lambda_image: Image, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    ended = image_cli("verify", str(lambda_image.id), "--report", report, *EMULATED)
    assert ended.code == 0, ended.err
    assert json.loads(report.read_text())["target"] == "lambda"


@pytest.mark.skipif(EMULATED != [], reason="tests/arm64/lambda_function.py is this for an emulated Graviton 2")
def test_lambdas_own_start_answers(function: Container) -> None:
    """A ready answer, and one of the model's."""
    for question, source in (("Who is the Wizard?", "cache"), ("A red kite lands on my shoulder.", "model")):
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 12}
        answer = invoke(function, events.http("POST", "/v1/chat/completions", body))
        assert (answer["statusCode"], answer["headers"]["x-emerald-source"]) == (200, source), answer
        assert json.loads(answer["body"])["choices"][0]["message"]["content"] != ""
