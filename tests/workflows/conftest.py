"""The workflows executed: act runs them on this machine as GitHub would, with small local stand-ins for the actions.

Every `run:` step is real: the pipeline, the Docker engine, the registry. Stand-ins are in `standins/`, as strict as
what they stand for: artifacts lose modes and may expire, every job logs in by itself, the registry knows Docker Hub's
refusals, and a private repository attests nothing. The tree under test is a copy of this one, with changes that a test
plants committed on top.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import docker
import pytest
import yaml

from pipeline.image.contents import OWN
from pipeline.image.promotion import SHOWN_DIGITS
from tests.conftest import ROOT
from tests.forge import TOKEN, Described, artifact, forge_served
from tests.image.conftest import NAME, PASSWORD, Registry, registry_at
from tests.workflows.standins.registry import StrictRegistry, strict

ACT = Path(sys.executable).with_name("act")
STANDINS = Path(__file__).parent / "standins"
RECORDED = ROOT / "tests/pipeline/image"
"""Where reports of the vulnerability scanner are."""
PINNED = re.compile(r"uses: ([\w-]+/[\w-]+)(/[\w-]+)?@([0-9a-f]{40})")
RUNNERS = ("ubuntu-24.04", "ubuntu-24.04-arm")
PATIENCE = 3600.0
KEPT = ("weights", "embedder", "answers", "verdicts")
"""Of the artifacts that a forge keeps, those that another one could have built."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A workflow that was executed."""

    code: int
    log: str
    jobs: Mapping[str, bool]
    """Jobs that ran, by name, and whether they succeeded; reusable workflows' jobs as CALLER/JOB."""

    def require_red(self, *names: str) -> None:
        """That the run failed, in just these jobs and in the aggregator, for all to see."""
        assert self.code != 0, self.log[-3000:]
        assert {name for name, passed in self.jobs.items() if not passed} == {*names, "pipeline"}, self.log[-3000:]

    def require_green(self) -> None:
        assert self.code == 0 and all(self.jobs.values()), self.log[-5000:]


@dataclass(kw_only=True)
class Fork:
    """A repository with its variables, secrets and what the forge keeps for it."""

    tree: Path
    store: Path
    variables: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    issues: list[Described] = field(default_factory=list)
    private: bool = False

    def edit(self, file: str, old: str, new: str) -> None:
        """Replaces a text that the file must hold, and commits."""
        text = (self.tree / file).read_text(encoding="utf-8")
        assert old in text, f"{file} holds no {old!r}"
        (self.tree / file).write_text(text.replace(old, new), encoding="utf-8")
        commit(self.tree, f"Edit {file}")

    def kept(self, prefix: str) -> list[Path]:
        """The artifacts that are kept under a name that begins so."""
        return list(self.store.glob(f"artifacts/*/{prefix}-*"))

    def current(self, prefix: str, *stages: str) -> Path:
        """The artifact of what these stages of the tree, as it is now, have made."""
        (kept,) = self.store.glob(f"artifacts/*/{self.name(prefix, *stages)}")
        return kept

    def expire(self, prefix: str) -> None:
        """What GitHub does with artifacts after their time."""
        assert self.kept(prefix)
        for kept in self.kept(prefix):
            shutil.rmtree(kept)

    def scanned(self, report: str) -> None:
        """What the vulnerability scanner finds from now on."""
        shutil.copyfile(RECORDED / report, self.store / "vulnerabilities.json")

    def name(self, prefix: str, *stages: str) -> str:
        """Name of the artifact in which the forge keeps what stages of the tree, as it is now, have made."""
        settings = "; ".join(
            f"{program}.cpu={self.variables['EMERALD_CPU']}" for program in ("export", "export_embedder")
        )
        command = [sys.executable, "-m", "pipeline", "key", *stages, "--set", settings]
        said = subprocess.run(command, cwd=self.tree, capture_output=True, text=True, check=True).stdout
        return f"{prefix}-{said.split()[0]}"

    def log(self) -> list[str]:
        """What the forge was asked for since the last time: "saved KEY", "uploaded NAME", "logged in"."""
        file = self.store / "log"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    def lines(self, name: str) -> list[str]:
        file = self.store / name
        return file.read_text().splitlines() if file.exists() else []

    def artifacts(self) -> list[Described]:
        """What its runs have kept, as the forge lists it."""
        return [artifact(kept.name, int(kept.parent.name)) for kept in self.store.glob("artifacts/*/*")]

    def workflows(self, event: str) -> set[str]:
        """Files of the workflows that an event starts."""
        listed = subprocess.run([ACT, event, "--list"], cwd=self.tree, capture_output=True, text=True, check=True)
        return set(re.findall(r"[\w-]+\.yml", listed.stdout))

    def run(self, event: str = "push", inputs: Mapping[str, str] | None = None, workflow: str = "pipeline.yml") -> Ran:
        """Executes a workflow, a job at a time."""
        for name in ("attested", "signed", "public-log"):
            (self.store / name).unlink(missing_ok=True)
        # later runs have larger numbers, also those of other forks that push to one registry
        number = max([int(time.time()), *(1 + int(run.name) for run in self.store.glob("artifacts/*"))])
        (self.store / f"artifacts/{number}").mkdir(parents=True)
        event_file = {"repository": {"private": self.private}, "inputs": dict(inputs or {})}
        (self.store / "event.json").write_text(json.dumps(event_file))
        with forge_served(self.artifacts, self.issues, private=self.private) as forge:
            done = subprocess.run(
                self._command(event, inputs or {}, workflow, forge.url, number),
                cwd=self.tree,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
        (self.store / "act.log").write_text(done.stdout)
        ran = Ran(code=done.returncode, log=done.stdout, jobs=jobs_of(done.stdout))
        return self._concluded(ran) if workflow == "pipeline.yml" and "pipeline" not in ran.jobs else ran

    def _command(self, event: str, inputs: Mapping[str, str], workflow: str, forge: str, number: int) -> list[str]:
        command = [str(ACT), event, "--workflows", f".github/workflows/{workflow}", "--no-cache-server"]
        command += ["--concurrent-jobs", "1", "--action-cache-path", str(self.store / "act")]
        command += ["--eventpath", str(self.store / "event.json")]
        for runner in RUNNERS:
            command += ["--platform", f"{runner}=-self-hosted"]
        for action, commit in sorted(pinned(self.tree)):
            command += ["--local-repository", f"{action}@{commit}={STANDINS / action.partition('/')[2]}"]
        environment = {
            "GITHUB_API_URL": forge,
            "GITHUB_RUN_ID": str(number),
            "EMERALD_TEST_STORE": str(self.store),
            "EMERALD_TEST_VENV": sys.prefix,
            "EMERALD_TEST_PRIVATE": json.dumps(self.private),
            "DOCKER_CONFIG": str(self.store / "logged-in-nowhere"),
            "DOCKER_HOST": os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"),
        }
        for option, values in (
            ("--var", self.variables),
            ("--secret", {"GITHUB_TOKEN": TOKEN, **self.secrets}),
            ("--input", inputs),
            ("--env", environment),
        ):
            for name, value in values.items():
                command += [option, f"{name}={value}"]
        return command

    def _concluded(self, ran: Ran) -> Ran:
        """With the aggregator, which act does not start once a called workflow has failed; GitHub does."""
        workflow = yaml.safe_load((self.tree / ".github/workflows/pipeline.yml").read_text(encoding="utf-8"))
        needs = {}
        for name in workflow["jobs"]["done"]["needs"]:
            passed = [ok for job, ok in ran.jobs.items() if job.partition("/")[0] == name]
            needs[name] = {"result": "skipped" if not passed else "success" if all(passed) else "failure"}
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.workflow.conclude"],
            cwd=self.tree,
            env={**os.environ, "NEEDS": json.dumps(needs)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == "", done.stderr  # it judged, and did not merely fail
        return Ran(code=ran.code, log=ran.log + done.stdout, jobs={**ran.jobs, "pipeline": done.returncode == 0})


def commit(tree: Path, message: str) -> None:
    """All that changed in it."""
    git = ["git", "-c", "user.name=author", "-c", "user.email=author@example.org"]
    subprocess.run([*git, "add", "--all"], cwd=tree, check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", message], cwd=tree, check=True)


def pinned(tree: Path) -> set[tuple[str, str]]:
    """Every action that the tree uses, with its commit."""
    files = [*tree.glob(".github/workflows/*.yml"), *tree.glob(".github/actions/*/action.yml")]
    return {(match[1], match[3]) for file in files for match in PINNED.finditer(file.read_text(encoding="utf-8"))}


def jobs_of(log: str) -> dict[str, bool]:
    """From act's log: "[pipeline/plan] 🏁  Job succeeded", or "[pipeline/weights/quantize.yml/quantize] …"."""
    found = re.findall(r"^\[(.+?)\]\s+🏁\s+Job (succeeded|failed)", log, re.MULTILINE)
    return {_short(name.removeprefix("pipeline/").strip()): how == "succeeded" for name, how in found}


def _short(name: str) -> str:
    """Without the workflow that the caller calls."""
    caller, *_, job = name.split("/") if "/" in name else (name, name)
    return name if caller == job else f"{caller}/{job}"


@dataclass(frozen=True, kw_only=True)
class Account:
    """Somebody's place in a registry."""

    registry: Registry
    front: StrictRegistry

    @property
    def repository(self) -> str:
        return f"127.0.0.1:{self.front.port}/{NAME}/emerald"

    def tags(self) -> dict[str, str]:
        """{tag: digest} of what is promoted; candidates and records of promotions are left out."""
        found = self.registry.tags().items()
        return {name: digest for name, digest in found if not re.search("candidate|-promoted-|-returned-", name)}

    def layers(self, digest: str) -> dict[str, int]:
        """{digest: bytes} of an image's layers."""
        return {layer["digest"]: layer["size"] for layer in json.loads(self._blob(digest).read_text())["layers"]}

    def record(self, form: str, digest: str) -> None:
        """A record of a promotion, as another run would have left it; `form` has a place for the digest's beginning."""
        name = form.format(digest.removeprefix("sha256:")[:SHOWN_DIGITS])
        shutil.copytree(self._tags / "latest", self._tags / name)

    def forget(self, prefix: str) -> None:
        """Takes records away."""
        for record in self._tags.glob(f"{prefix}*"):
            shutil.rmtree(record)

    @property
    def _tags(self) -> Path:
        return self.registry.data / f"docker/registry/v2/repositories/{NAME}/emerald/_manifests/tags"

    @contextmanager
    def without(self, layer: str) -> Iterator[None]:
        """A registry that has lost a layer, until the block ends."""
        blob = self._blob(layer)
        lost = blob.rename(blob.with_name("lost"))
        try:
            yield
        finally:
            lost.rename(blob)

    def _blob(self, digest: str) -> Path:
        return self.registry.data / f"docker/registry/v2/blobs/sha256/{digest[7:9]}/{digest[7:]}/data"


def forget_images() -> None:
    """Takes all of our images from the engine, and what it knows of layers that registries have."""
    engine = docker.from_env()
    for image in engine.images.list(filters={"label": f"{OWN}.model"}):
        engine.images.remove(str(image.id), force=True)
    known = Path(engine.info()["DockerRootDir"]) / f"image/{engine.info()['Driver']}/distribution"
    if known.exists():  # it is made with the first layer that is pulled or pushed
        shutil.rmtree(known)
    engine.close()


@pytest.fixture(scope="session")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """A registry that asks for a password, behind one that refuses as Docker Hub does."""
    with (
        registry_at(tmp_path_factory.mktemp("registry"), password=True) as served,
        strict(served.port, served.data) as front,
    ):
        yield Account(registry=served, front=front)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree as git has it or would add it, committed, with no history."""
    tree = tmp_path_factory.mktemp("fork") / "tree"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    subprocess.run(["git", "init", "--quiet", "--initial-branch", "main"], cwd=tree, check=True)
    commit(tree, "All that there is")
    return tree


@pytest.fixture(scope="session")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory, account: Account) -> tuple[Fork, Ran]:
    """A fresh fork without a secret, and its first push, which builds all there is to build: a quarter of an hour.

    EMERALD_TEST_CACHES names a folder for what it has built, from which the next session begins: keys are digests of
    all that goes in, so what has changed since is built anew.
    """
    fork = make_fork(tree, tmp_path_factory.mktemp("forge"))
    kept = os.environ.get("EMERALD_TEST_CACHES")
    if kept:
        copy_kept(Path(kept), fork.store)
    ran = fork.run()
    if kept:
        copy_kept(fork.store, Path(kept))
    return fork, ran


def copy_kept(store: Path, other: Path) -> None:
    """What a forge has built, to where another begins with it."""
    for prefix in KEPT:
        for folder in store.glob(f"artifacts/*/{prefix}-*"):
            shutil.copytree(folder, other / folder.relative_to(store), dirs_exist_ok=True)


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """A push that was promoted."""

    fork: Fork
    ran: Ran
    digest: str
    """Of the image."""


@pytest.fixture(scope="session")
def promoted(
    built: tuple[Fork, Ran], tree: Path, tmp_path_factory: pytest.TempPathFactory, account: Account
) -> Promotion:
    """The first push with credentials."""
    fork = make_fork_with_credentials(tree, tmp_path_factory.mktemp("promoted"), built[0], account)
    ran = fork.run()
    ran.require_green()
    return Promotion(fork=fork, ran=ran, digest=account.tags()["latest"])


@pytest.fixture
def fork(built: tuple[Fork, Ran], tree: Path, tmp_path: Path, account: Account) -> Fork:
    """A fork with credentials, after its first push: what that has built is kept."""
    return make_fork_with_credentials(tree, tmp_path, built[0], account)


def make_fork_with_credentials(tree: Path, folder: Path, built: Fork, account: Account) -> Fork:
    """A copy of the tree, on a forge that knows what was built and may push."""
    made = make_fork(tree, folder)
    copy_kept(built.store, made.store)
    made.variables |= {"DOCKERHUB_USERNAME": NAME, "EMERALD_IMAGE": account.repository}
    made.secrets["DOCKERHUB_TOKEN"] = PASSWORD
    return made


def make_fork(tree: Path, folder: Path) -> Fork:
    """A copy of the tree, on a forge that knows nothing of it yet."""
    store = folder / "store"
    store.mkdir()
    made = Fork(tree=shutil.copytree(tree, folder / "tree"), store=store)
    made.scanned("grype-unfixable.json")
    made.variables["EMERALD_CPU"] = "native"
    made.variables["EMERALD_IMAGE_ARGUMENTS"] = os.environ.get("EMERALD_IMAGE_ARGUMENTS", "")
    return made
