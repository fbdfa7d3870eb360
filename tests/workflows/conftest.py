"""The workflows executed: act runs them on this machine as GitHub would, with small local stand-ins for the actions.

Every `run:` step is real: the pipeline, the Docker engine, the registry. Stand-ins are in `actions/`; they keep caches
and artifacts in a folder, and write down what would be signed. The tree under test is a copy of this one, with changes
that a test plants committed on top.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import docker
import pytest
import yaml

from pipeline.image.contents import OWN
from tests.conftest import ROOT
from tests.forge import TOKEN, Described, artifact, forge_served
from tests.image.conftest import NAME, PASSWORD, Registry, registry_at

ACT = Path(sys.executable).with_name("act")
ACTIONS = Path(__file__).parent / "actions"
PINNED = re.compile(r"uses: ([\w-]+/[\w-]+)(/[\w-]+)?@([0-9a-f]{40})")
RUNNERS = ("ubuntu-24.04", "ubuntu-24.04-arm")
PATIENCE = 3600.0
KEPT = ("caches/*", "artifacts/*/weights-*")
"""Of what a forge keeps, what another one could have built."""


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

    def edit(self, file: str, old: str, new: str) -> None:
        """Replaces a text that the file must hold, and commits."""
        text = (self.tree / file).read_text(encoding="utf-8")
        assert old in text, f"{file} holds no {old!r}"
        (self.tree / file).write_text(text.replace(old, new), encoding="utf-8")
        commit(self.tree, f"Edit {file}")

    def tamper(self, prefix: str, file: str, old: str, new: str) -> None:
        """Changes a file of what is kept under a key that begins so."""
        for kept in self.store.glob(f"caches/{prefix}-*"):
            text = (kept / file).read_text(encoding="utf-8")
            assert old in text
            (kept / file).write_text(text.replace(old, new), encoding="utf-8")

    def key(self, stage: str) -> str:
        """Under which the forge keeps what a stage of the tree, as it is now, has made."""
        settings = "; ".join(
            f"{program}.cpu={self.variables['EMERALD_CPU']}" for program in ("export", "export_embedder")
        )
        command = [sys.executable, "-m", "pipeline", "key", stage, "--set", settings]
        return subprocess.run(command, cwd=self.tree, capture_output=True, text=True, check=True).stdout.split()[0]

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
        for name in ("attested", "signed"):
            (self.store / name).unlink(missing_ok=True)
        number = 1 + max((int(run.name) for run in self.store.glob("artifacts/*")), default=0)
        (self.store / f"artifacts/{number}").mkdir(parents=True)
        with forge_served(self.artifacts, self.issues) as forge:
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
        for runner in RUNNERS:
            command += ["--platform", f"{runner}=-self-hosted"]
        for action, commit in sorted(pinned(self.tree)):
            command += ["--local-repository", f"{action}@{commit}={ACTIONS / action.partition('/')[2]}"]
        environment = {
            "GITHUB_API_URL": forge,
            "GITHUB_RUN_ID": str(number),
            "EMERALD_TEST_STORE": str(self.store),
            "EMERALD_TEST_VENV": sys.prefix,
            "DOCKER_CONFIG": str(self.store / "docker"),
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

    @property
    def repository(self) -> str:
        return self.registry.repository

    def tags(self) -> dict[str, str]:
        """{tag: digest} of what is promoted; candidates and records of promotions are left out."""
        found = self.registry.tags().items()
        return {name: digest for name, digest in found if not re.search("candidate|-promoted-|-returned-", name)}

    def layers(self, digest: str) -> dict[str, int]:
        """{digest: bytes} of an image's layers."""
        return {layer["digest"]: layer["size"] for layer in json.loads(self._blob(digest).read_text())["layers"]}

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
    """A registry that asks for a password."""
    with registry_at(tmp_path_factory.mktemp("registry"), password=True) as served:
        yield Account(registry=served)


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
    for pattern in KEPT:
        for folder in store.glob(pattern):
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
    made.variables["EMERALD_CPU"] = "native"
    made.variables["EMERALD_IMAGE_ARGUMENTS"] = os.environ.get("EMERALD_IMAGE_ARGUMENTS", "")
    return made
