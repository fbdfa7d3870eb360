"""The image itself: verified as it is, and found out when it is spoilt. Run with make test-image."""

import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.models.images import Image

from pipeline.image.contents import platform_of
from tests.image.conftest import ARGUMENTS, EMULATED, image_cli

Change = Callable[[str], Image]


@pytest.fixture(scope="module")
def report(image: Image, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What verifying the image says."""
    path = tmp_path_factory.mktemp("verified") / "report.json"
    ended = image_cli("verify", str(image.id), "--report", path, *EMULATED)
    assert ended.code == 0, ended.err
    assert "loading: " in ended.err
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def failed(report: Path) -> set[str]:
    """The checks that failed, by name."""
    return {check["name"] for check in json.loads(report.read_text())["checks"] if not check["passed"]}


def test_image_is_fit_to_be_shown(report: dict[str, Any]) -> None:
    assert report["passed"]
    names = {check["name"] for check in report["checks"]}
    assert names >= {
        "labels that say otherwise than what is inside",
        "missing of what the model's licence asks for",
        "megabytes without weights",
        "runs as another user than root",
        "holds no capabilities",
        "folders that can be written to",
        "certificate is admitted",
        "hit",
        "hit, streamed",
        "miss",
        "miss, streamed",
        "a streamed reply is the whole one",
        "a wrong request is refused by name",
        "health check",
        "a reply under way at SIGTERM ends whole",
        "ends with 0 after SIGTERM",
        "ready, warm start",
    }


def test_labels_say_what_the_build_folder_holds(report: dict[str, Any], build: Path) -> None:
    engine = json.loads((build / "engine/manifest.json").read_text())
    labels = report["labels"]
    assert labels["emerald.model"] == engine["model_id"]
    assert labels["emerald.cpu"] == engine["cpu"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert {"org.opencontainers.image.title", "org.opencontainers.image.version"} <= labels.keys()


def test_weights_lie_below_what_changes_more_often(image: Image) -> None:
    """Of the layers that this project adds, from the bottom: system, packages, weights, embedder, cache, code.

    Those of the base lie below, and may be made by the same programs.
    """
    history = [(layer["CreatedBy"], layer["Size"]) for layer in reversed(image.history())]
    first = next(place for place, (line, _) in enumerate(history) if "libtcmalloc" in line)
    made = [line for line, size in history[first:] if size > 10_000]
    steps = [next((word for word in ("apt-get", "COPY", "ADD") if word in line), "") for line in made]
    assert [step for step in steps if step] == ["apt-get", "COPY", "ADD", "ADD", "ADD", "COPY"]


def test_quota_of_the_container_sets_the_threads(client: docker.DockerClient, image: Image) -> None:
    command = ["python", "-c", "from model.cpu import available_cores; print(available_cores())"]
    said = client.containers.run(
        image,
        command,
        remove=True,
        platform=platform_of(image),
        network_mode="none",
        cpu_period=100000,
        cpu_quota=90000,
    )
    assert said.strip() == b"1"


def test_two_builds_are_the_same(client: docker.DockerClient, image: Image, build: Path) -> None:
    """Every layer, to the bit, and so every file with its date, owner and mode."""
    again = image_cli("build", "--build", build, "--tag", "emerald:again", *ARGUMENTS)
    assert re.search(r"2/\d+\] has been done", again.err), "an engine that repeats steps does not say so"
    ended = image_cli("build", "--build", build, "--tag", "emerald:again", "--no-cache", *ARGUMENTS)
    assert ended.code == 0, ended.err
    assert re.search(r"2/\d+\] RUN .*apt-get", ended.err) and not re.search(r"2/\d+\] has been done", ended.err)
    anew = client.images.get(ended.out)
    ours, theirs = (made.attrs["RootFS"]["Layers"] for made in (image, anew))
    client.images.remove("emerald:again")
    assert ours == theirs


FLIP = """USER 0
RUN python3 -c "import pathlib; file, = pathlib.Path('/emerald/build/{folder}').glob('{pattern}'); \\
    content = bytearray(file.read_bytes()); content[len(content) // 2] ^= 1; file.write_bytes(content)"
USER 10001:10001"""


def test_flipped_weights_are_found(changed: Change, tmp_path: Path) -> None:
    spoilt = changed(FLIP.format(folder="engine", pattern="*.safetensors"))
    ended = image_cli("verify", str(spoilt.id), "--report", tmp_path / "report.json", *EMULATED)
    assert ended.code == 1
    large = {"megabytes without weights"}  # the flip is a second copy of them, in a layer of its own
    assert failed(tmp_path / "report.json") - large == {"ready, first start"}
    assert "SHA-256" in ended.err


def test_a_forged_certificate_is_found(changed: Change, tmp_path: Path, build: Path) -> None:
    """The server falls back to exact matches; the image is not fit, since its label promises more, or its file lies."""
    if not json.loads((build / "certificate.json").read_text())["certified"]:
        pytest.skip("this build has no certificate that could be forged")
    forge = 'USER 0\nRUN sed -i \'s/"threshold": 0/"threshold": -0/\' /emerald/build/certificate.json\nUSER 10001:10001'
    ended = image_cli("verify", str(changed(forge).id), "--report", tmp_path / "report.json", *EMULATED)
    assert ended.code == 1
    assert failed(tmp_path / "report.json") == {"certificate is admitted"}


@pytest.mark.parametrize(
    ("lines", "check"),
    [
        ("HEALTHCHECK --interval=1s --start-period=1s --retries=1 CMD false", "health check"),
        ("USER 0", "runs as another user than root"),
        ("LABEL emerald.model=another/model", "labels that say otherwise than what is inside"),
        ("ENV LD_PRELOAD=", "allocator is tcmalloc"),
        ("ENV HOST=127.0.0.2", "ready, first start"),
        ("ENV PORT=none", "ready, first start"),
        ("VOLUME /data\nVOLUME /tmp\nUSER 0\nRUN chmod 777 /tmp\nUSER 10001:10001", "folders that can be written to"),
    ],
)
def test_planted_defects_are_found(changed: Change, tmp_path: Path, lines: str, check: str) -> None:
    spoilt, report = changed(lines), tmp_path / "report.json"
    patience = "5" if "HOST" in lines else "600"
    ended = image_cli("verify", str(spoilt.id), "--report", report, "--patience", patience, *EMULATED)
    assert ended.code == 1
    assert check in failed(report)


def test_image_of_another_architecture_is_refused(client: docker.DockerClient, build: Path, tmp_path: Path) -> None:
    """In both directions: an image that was made elsewhere, and an engine that was exported elsewhere."""
    found = client.info()["Architecture"]
    other, cpu = ("arm64", "aarch64") if found == "x86_64" else ("amd64", "x86-64-v3")
    subprocess.run(["tar", "--create", "--file", tmp_path / "root.tar", "--files-from", "/dev/null"], check=True)
    made = client.api.import_image(str(tmp_path / "root.tar"), repository="emerald-elsewhere", changes=["CMD true"])
    foreign = _with_architecture(client, json.loads(made)["status"], other)
    ended = image_cli("verify", foreign)
    client.images.remove(foreign, force=True)
    assert ended.code == 2
    assert f"it is for linux/{other}" in ended.err
    exported = Path(
        shutil.copytree(build, tmp_path / "build", ignore=shutil.ignore_patterns("int4", "trained", "check*"))
    )
    manifest = json.loads((exported / "engine/manifest.json").read_text())
    (exported / "engine/manifest.json").write_text(json.dumps({**manifest, "cpu": cpu}))
    ended = image_cli("build", "--build", exported, "--tag", "emerald:never", "--platform", f"linux/{_native(found)}")
    assert ended.code == 2
    assert f"exported for {cpu}" in " ".join(ended.err.split())


def _native(machine: str) -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}[machine]


def _with_architecture(client: docker.DockerClient, image: str, architecture: str) -> str:
    """The image with another architecture in its configuration, which is all that a refusal can look at.

    `docker save` writes where the configuration is into manifest.json, in Docker's own layout as in OCI's.
    """
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(b"".join(client.images.get(image).save()))) as saved:
        files = {member.name: saved.extractfile(member) for member in saved.getmembers() if member.isfile()}
        contents = {name: file.read() for name, file in files.items() if file is not None}
    (described,) = json.loads(contents["manifest.json"])
    changed = json.dumps({**json.loads(contents[described["Config"]]), "architecture": architecture}).encode()
    layers = {name: contents[name] for name in described["Layers"]}
    manifest = json.dumps([{**described, "Config": "config.json"}]).encode()
    with tarfile.open(fileobj=out, mode="w") as target:
        for name, content in {**layers, "config.json": changed, "manifest.json": manifest}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    (loaded,) = client.images.load(out.getvalue())
    return str(loaded.id)
