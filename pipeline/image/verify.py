"""Runs an image as its users are told to, asks it what users ask, and says whether it may be shown to them.

The container has a read-only root, no network, no capabilities and nothing mounted, so that an image which needs any of
that is found out. What is inside is compared with what the labels say, and the server itself verifies every byte of
weights, cache and certificate before it is ready.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import docker
from docker.models.containers import Container
from docker.models.images import Image

from model.errors import InputError
from pipeline.image.contents import CARD, OWN, Contents, platform_of, read_contents
from pipeline.image.engine import explained, layer_bytes, machine
from pipeline.image.session import Session
from pipeline.licences import missing
from pipeline.progress import say
from pipeline.verdict import Check

SIZE_MB_MAX = {"arm64": 900.0, "amd64": 1300.0}
"""Megabytes without weights, by architecture: PyTorch for x86-64 is the larger one."""
HEALTHY_SECONDS = 120.0
STOP_SECONDS = 90
SERVE = ["python", "-m", "serving", "serve"]


@dataclass(kw_only=True)
class Verdict:
    """What was checked, and what was measured and found on the way."""

    checks: list[Check] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    """Why checks failed, as far as it can be said in words."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def holds(self, name: str, truth: bool, reason: str = "") -> None:
        """A check that is true or not."""
        self.checks.append(Check(name=name, value=float(truth), limit=1.0, bound="at least"))
        if not truth and reason:
            self.reasons.append(f"{name}: {reason}")

    def none_of(self, name: str, faults: Sequence[str]) -> None:
        """A check that there are no faults."""
        self.checks.append(Check(name=name, value=float(len(faults)), limit=0.0, bound="at most"))
        self.reasons += [f"{name}: {fault}" for fault in faults]


def verify(
    client: docker.DockerClient, image: Image, digest: str | None, *, cpuinfo: Path | None, patience: float
) -> Verdict:
    """Every check of an image; `digest` is the registry's, if it came from one.

    Raises InputError if this machine cannot run the image. `cpuinfo` says that another architecture's is wanted, and
    what /proc/cpuinfo would say there: QEMU before 8.2 shows the machine's own.
    """
    if platform_of(image) != machine(client) and cpuinfo is None:
        raise InputError(
            f"{image.id}: it is for {platform_of(image)}, and this engine runs {machine(client)}: verify it on such a "
            "machine, or, where Docker emulates the other, add --emulated"
        )
    contents, verdict = read_contents(client, image), Verdict()
    _look(client, image, contents, verdict)
    if digest is not None:
        came = [name.partition("@")[2] for name in image.attrs["RepoDigests"]]
        verdict.holds("what came is the digest", digest in came, f"{digest} was asked for, {came} came")
        verdict.facts["digest"] = digest
    with _running(client, image, cpuinfo) as container:
        session = Session(container)
        ready = _wait(session, verdict, "first", patience)
        if ready:
            _meet(session, contents, verdict, ready)
            _converse(session, contents, verdict)
            if verdict.facts["target"] == "serve":
                verdict.holds("health check", *_healthy(container))
            _end(container, session, verdict)
    if ready:
        with _running(client, image, cpuinfo) as container:
            _wait(Session(container), verdict, "warm", patience)
    return verdict


def _look(client: docker.DockerClient, image: Image, contents: Contents, verdict: Verdict) -> None:
    """What can be seen without running it."""
    labels, engine = dict(image.labels), contents.json("build/engine/manifest.json")
    weights = sum(entry["bytes"] for name, entry in engine["files"].items() if name.endswith(".safetensors"))
    size = layer_bytes(image)
    architecture = image.attrs["Architecture"]
    verdict.facts |= {
        "image": image.id,
        "architecture": architecture,
        "target": labels.get(f"{OWN}.target", "serve"),
        "labels": labels,
        "layers": image.attrs["RootFS"]["Layers"],
        "bytes": size,
        "weights_bytes": weights,
    }
    verdict.none_of("labels that say otherwise than what is inside", contents.differences(labels))
    for model, folder in (("model", "engine"), ("embedder", "embedder")):
        manifest = contents.json(f"build/{folder}/manifest.json")
        lacking = missing(contents.notices(model), contents.text(CARD), labels, manifest)
        verdict.none_of(f"missing of what the {model}'s licence asks for", lacking)
    verdict.checks.append(
        Check(
            name="megabytes without weights",
            value=(size - weights) / 1e6,
            limit=SIZE_MB_MAX[architecture],
            bound="at most",
        )
    )


@contextmanager
def _running(client: docker.DockerClient, image: Image, cpuinfo: Path | None) -> Iterator[Container]:
    """A container as strict as the README's, removed in the end."""
    volumes = [f"{cpuinfo.resolve()}:/proc/cpuinfo:ro"] if cpuinfo else []
    container = client.containers.create(
        image,
        SERVE,
        platform=platform_of(image),
        read_only=True,
        network_mode="none",
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        volumes=volumes,
    )
    try:
        container.start()
        yield container
    finally:
        container.remove(v=True, force=True)


def _wait(session: Session, verdict: Verdict, which: str, patience: float) -> dict[str, Any] | None:
    """Waits until it is ready, showing the progress; what it said then, or None if it never was."""
    container = session.container
    last: dict[str, Any] = {"failed": "it ended before it answered"}
    for last in session.probe("wait", patience):
        if "progress" in last:
            say(f"  loading: {last['progress']:.0%}")
    container.reload()
    ready = last.get("ready")
    if ready is None:
        log = container.logs(tail=20).decode("utf-8", "replace").strip()
        if "exec format error" in log:
            raise explained(log, str(container.image.id if container.image else container.id))
        verdict.holds(f"ready, {which} start", False, f"{last.get('failed')}\n{log}")
        return None
    started = datetime.fromisoformat(container.attrs["State"]["StartedAt"][:26].rstrip("Z") + "+00:00")
    seconds = ready - started.timestamp()
    say(f"  ready after {seconds:.2f} s ({which} start)")
    verdict.holds(f"ready, {which} start", True)
    verdict.facts.setdefault("ready_seconds", {})[which] = round(seconds, 3)
    return last


def _meet(session: Session, contents: Contents, verdict: Verdict, ready: dict[str, Any]) -> None:
    """Who runs there, and whether the certificate was admitted."""
    (found,) = session.probe("identity")
    machines = {"arm64": "aarch64", "amd64": "x86_64"}
    wanted = machines.get(verdict.facts["architecture"])
    cpu = contents.json("build/engine/manifest.json")["cpu"].split("+")[0].replace("x86-64", "x86_64")
    verdict.holds("runs as another user than root", found["uid"] != 0, f"user {found['uid']}")
    verdict.holds("holds no capabilities", int(found["kept_capabilities"], 16) == 0, found["kept_capabilities"])
    verdict.none_of("folders that can be written to", found["writable"])
    verdict.holds("allocator is tcmalloc", found["allocator"], "LD_PRELOAD was not honoured")
    verdict.holds(
        "architecture is the engine's",
        found["machine"] == wanted and cpu.startswith(str(wanted)),
        f"the image says {wanted}, it runs on {found['machine']}, its engine is for {cpu}",
    )
    certificate = contents.facts()[f"{OWN}.certificate"]
    said = "exact matches only" if certificate == "none" else f"certified {certificate}"
    verdict.holds("certificate is admitted", ready["cache"] == said, f"it says {ready['cache']!r}, inside is {said!r}")


def _converse(session: Session, contents: Contents, verdict: Verdict) -> None:
    """A hit, a miss that the model answers, both streamed too, and a request that is wrong."""
    entry = contents.json("build/cache/entries.json")["entries"][0]
    hit = {"messages": [{"role": "user", "content": entry["phrasings"][0]}]}
    miss = {
        "messages": [{"role": "user", "content": "A red kite lands on my shoulder. What does it whisper?"}],
        "max_tokens": 24,
        "temperature": 0,
    }
    asked = {"hit": hit, "miss": miss, "wrong": {**hit, "temperature": 99}}
    asked |= {"hit, streamed": {**hit, "stream": True}, "miss, streamed": {**miss, "stream": True}}
    answers = {answer["name"]: answer for answer in session.probe("ask", asked)}
    verdict.facts["answers"] = {
        name: {
            "seconds": answer["seconds"],
            "tokens_per_second": ((answer["body"] or {}).get("timings") or {}).get("tokens_per_second"),
            "text": said(answer),
        }
        for name, answer in answers.items()
    }
    for name in ("hit", "hit, streamed"):
        answer = answers[name]
        right = answer["headers"].get("x-emerald-source") == "cache" and said(answer) == entry["answer"]
        verdict.holds(name, right, f"{entry['id']} was asked for: {_brief(answer)}")
    for name in ("miss", "miss, streamed"):
        answer = answers[name]
        verdict.holds(name, answer["headers"].get("x-emerald-source") == "model" and bool(said(answer)), _brief(answer))
    verdict.holds("a streamed reply is the whole one", said(answers["miss"]) == said(answers["miss, streamed"]))
    wrong = answers["wrong"]
    refused = wrong["status"] == 400 and "temperature" in str((wrong["body"] or {}).get("error", {}).get("message"))
    verdict.holds("a wrong request is refused by name", refused, _brief(wrong))


def said(answer: dict[str, Any]) -> str:
    """The text of a reply, whole or streamed; empty for an error or a stream that was cut."""
    if answer["status"] != 200:
        return ""
    if answer["events"] is None:
        return str(answer["body"]["choices"][0]["message"]["content"])
    if answer["events"][-1:] != ["[DONE]"]:
        return ""
    chunks = [json.loads(event) for event in answer["events"][:-1]]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def _brief(answer: dict[str, Any]) -> str:
    source = answer["headers"].get("x-emerald-source", "nowhere")
    return f"status {answer['status']}, from {source}: {str(answer['body'] or said(answer))[:300]!r}"


def _healthy(container: Container) -> tuple[bool, str]:
    """Waits for the engine's own health check; whether it passes, and what it says."""
    end = time.monotonic() + HEALTHY_SECONDS
    health: dict[str, Any] = {"Status": "starting", "Log": []}
    while time.monotonic() < end and health["Status"] == "starting":
        time.sleep(0.5)
        container.reload()
        health = container.attrs["State"].get("Health") or {"Status": "none", "Log": []}
    last = health["Log"][-1]["Output"] if health["Log"] else "it has not run"
    return health["Status"] == "healthy", f"{health['Status']}: {last}"


def _end(container: Container, session: Session, verdict: Verdict) -> None:
    """SIGTERM in the middle of a reply: the reply ends whole, then the server does."""
    speed = verdict.facts["answers"]["miss"]["seconds"] / 24
    body = {
        "messages": [{"role": "user", "content": "Tell me of a long walk, step by step."}],
        "max_tokens": max(8, min(400, round(2 / speed))),
        "temperature": 0,
        "emerald": {"cache": False},
    }
    told: dict[str, Any] = {}
    asked_to_end = 0.0
    for event in session.probe("drain", body):
        told |= event
        if "began" in event:
            asked_to_end = time.time()
            container.kill(signal="SIGTERM")
    code = cast("dict[str, int]", container.wait(timeout=STOP_SECONDS))["StatusCode"]
    whole = told.get("done", 0.0) > asked_to_end > 0
    verdict.holds("a reply under way at SIGTERM ends whole", whole, f"{told}")
    verdict.holds("ends with 0 after SIGTERM", code == 0, f"exit code {code}")
