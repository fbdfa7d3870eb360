"""Decides what a run of the pipeline workflow does, and says what it lacks for more: python3 -m pipeline.workflow.plan.

Reads what GitHub gives a job (the dispatch's inputs, the repository's variables, whether secrets are set, whether the
repository is private) and writes the outputs of `Plan`. A fork without a single secret gets a green run that builds
and tests its image and pushes nothing; the job summary then names what to set for what. A configuration that cannot be
built, for want of a token, by a setting out of range or for want of storage, is an error before machine time is spent.

With `--published` it says where the images are (repository, registry, tag), which takes no account, and no more.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import InputError
from pipeline.configs import Config, named_config, with_settings

VARIABLES = (
    "DOCKERHUB_USERNAME", "EMERALD_IMAGE", "EMERALD_CONFIG", "EMERALD_SETTINGS", "EMERALD_CPU", "EMERALD_ATTEST",
    "EMERALD_SIGN", "EMERALD_ARTIFACT_GB", "AWS_ROLE",
)  # fmt: skip
"""Variables of a repository that a plan depends on, each given as an environment variable of its name."""
DEFAULT_CPU = "aarch64"
"""What programs are compiled for unless the variable EMERALD_CPU names another family: every Arm server since
Graviton 2 runs it, and KleidiAI picks its kernels for the CPU it meets."""
AS_CONFIGURED = "as configured"
REPOSITORY = re.compile(r"[a-z0-9.:-]+(?:/[a-z0-9._-]+)+")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
RETENTION_DAYS = {"public": 90, "private": 7}
"""How long GitHub keeps artifacts: as long as it may where that is free, and not long where it is paid for."""
ARTIFACT_GB = {"embedded": 0.3, "llama31-8b": 4.9}
"""What a run keeps as artifacts: the engine, the embedder, the answers."""
FREE_ARTIFACT_GB = 0.5
"""Storage of artifacts that GitHub's free plan gives a private repository; public ones have no limit."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What GitHub tells a job; `inputs` is empty on a push."""

    event: str
    inputs: Mapping[str, Any]
    variables: Mapping[str, str]
    dockerhub_token: bool
    hf_token: bool
    private: bool

    @classmethod
    def from_environment(cls) -> "Asked":
        return cls(
            event=os.environ["GITHUB_EVENT_NAME"],
            inputs=json.loads(os.environ["INPUTS"]) or {},
            variables=variables_of(os.environ),
            dockerhub_token=os.environ["HAS_DOCKERHUB_TOKEN"] == "true",
            hf_token=os.environ["HAS_HF_TOKEN"] == "true",
            private=os.environ["PRIVATE"] == "true",
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does; the fields are the outputs of its step."""

    config: str
    settings: str
    """STAGE.FIELD=VALUE, separated by semicolons, as --set takes them."""
    push: bool
    repository: str
    """Where the image goes, such as docker.io/NAME/emerald; empty if nowhere."""
    tag: str
    attest: bool
    """Whether verdicts, contents and provenance are attested: in a private repository that takes a paid plan."""
    sign: bool
    """Whether the image is signed without a key, which writes the repository's name into a public log."""
    retention_days: int

    @property
    def registry(self) -> str:
        return self.repository.partition("/")[0]


def main(arguments: Sequence[str] = ()) -> int:
    """Writes the outputs and the summary; 2 if what was asked for cannot be done."""
    parser = argparse.ArgumentParser(prog="python3 -m pipeline.workflow.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--published", action="store_true", help="only say where the images are")
    options = parser.parse_args(arguments)
    try:
        if options.published:
            repository = repository_of(variables_of(os.environ))
            _append("GITHUB_OUTPUT", f"repository={repository}\nregistry={repository.partition('/')[0]}\ntag=latest\n")
            print(repository, flush=True)
            return 0
        asked = Asked.from_environment()
        plan = planned(asked)
    except InputError as fault:
        print(f"::error::{fault}", flush=True)
        return 2
    outputs = {**vars(plan), "registry": plan.registry}
    lines = [f"{name}={json.dumps(value) if isinstance(value, bool) else value}" for name, value in outputs.items()]
    _append("GITHUB_OUTPUT", "\n".join([*lines, ""]))
    _append("GITHUB_STEP_SUMMARY", summary(asked, plan))
    print(summary(asked, plan), flush=True)
    return 0


def variables_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The repository's variables that are set."""
    return {name: environment[name] for name in VARIABLES if environment.get(name)}


def planned(asked: Asked) -> Plan:
    """Raises InputError for a wish that cannot be met."""
    wish = asked.inputs.get("config") or AS_CONFIGURED
    name = str(wish if wish != AS_CONFIGURED else asked.variables.get("EMERALD_CONFIG") or "embedded")
    settings = _settings(asked)
    if asked.inputs.get("model") and "fetch.licence=" not in settings:
        raise InputError(
            f"model {asked.inputs['model']!r}: an image says under which licence its weights are passed on; add "
            "fetch.licence=Apache-2.0 or fetch.licence=llama3.2, as the model's page has it, to the settings"
        )
    config = with_settings(named_config(name), [settings])
    if config.fetch.source.startswith("hub:") and not asked.hf_token:
        raise InputError(
            f"configuration {name} reads {config.fetch.model_id} from the hub: ask for access on its page, make a read "
            "token there, and set it as the secret HF_TOKEN (Settings, Secrets and variables, Actions)"
        )
    tag = str(asked.inputs.get("tag") or "latest")
    if not TAG.fullmatch(tag):
        raise InputError(f"tag {tag!r}: a tag has letters, digits, dots, dashes and underscores; choose another")
    wished = asked.event == "push" or bool(asked.inputs.get("push"))
    account = asked.dockerhub_token and bool(asked.variables.get("DOCKERHUB_USERNAME"))
    repository = repository_of(asked.variables) if wished and account else ""
    _require_storage(asked, name)
    return Plan(
        config=name,
        settings=settings,
        push=bool(repository),
        repository=repository,
        tag=tag,
        attest=not asked.private or _is_on(asked, "EMERALD_ATTEST"),
        sign=not asked.private or _is_on(asked, "EMERALD_SIGN"),
        retention_days=RETENTION_DAYS["private" if asked.private else "public"],
    )


def _require_storage(asked: Asked, config: str) -> None:
    """Raises InputError for a private repository whose artifacts would not fit, as would show after hours of work."""
    text = asked.variables.get("EMERALD_ARTIFACT_GB", str(FREE_ARTIFACT_GB))
    try:
        has = float(text)
    except ValueError as fault:
        raise InputError(f"variable EMERALD_ARTIFACT_GB = {text!r}: expected a number of GB, such as 50") from fault
    needs = ARTIFACT_GB[config]
    if asked.private and needs > has:
        raise InputError(
            f"configuration {config} keeps {needs:g} GB of artifacts, and a private repository has {has:g} GB: make "
            "the repository public, or pay for storage and set the variable EMERALD_ARTIFACT_GB to what the account has"
        )


def _is_on(asked: Asked, name: str) -> bool:
    value = asked.variables.get(name, "false")
    if value not in ("true", "false"):
        raise InputError(f"variable {name} = {value!r}: expected true or false")
    return value == "true"


def _settings(asked: Asked) -> str:
    cpu = asked.variables.get("EMERALD_CPU") or DEFAULT_CPU
    chosen = [f"export.cpu={cpu}", f"export_embedder.cpu={cpu}"]
    chosen.append(asked.variables.get("EMERALD_SETTINGS", ""))
    if model := asked.inputs.get("model"):
        chosen += [f"fetch.source=hub:{model}", f"fetch.model_id={str(model).partition('@')[0]}", "fetch.sha256=none"]
    scheme = asked.inputs.get("scheme") or AS_CONFIGURED
    if scheme != AS_CONFIGURED:
        chosen.append(f"quantize.scheme={scheme}")
    chosen.append(str(asked.inputs.get("settings") or ""))
    return "; ".join(part.strip() for part in chosen if part.strip())


def repository_of(variables: Mapping[str, str]) -> str:
    """EMERALD_IMAGE, or the user's own on Docker Hub. A first part without a dot or a port is a name there, too."""
    user = variables.get("DOCKERHUB_USERNAME", "").lower()
    name = variables.get("EMERALD_IMAGE") or (f"{user}/emerald" if user else "")
    if not name:
        raise InputError(
            "no image is known: set the variable DOCKERHUB_USERNAME, or EMERALD_IMAGE for another registry"
        )
    if not REPOSITORY.fullmatch(name):
        variable = "EMERALD_IMAGE" if variables.get("EMERALD_IMAGE") else "DOCKERHUB_USERNAME"
        raise InputError(f"variable {variable} gives {name!r}: expected REGISTRY/NAMESPACE/NAME in lower case, no tag")
    first = name.partition("/")[0]
    return name if "." in first or ":" in first or first == "localhost" else f"docker.io/{name}"


def summary(asked: Asked, plan: Plan) -> str:
    """What this run does and what it lacks, as Markdown."""
    config: Config = with_settings(named_config(plan.config), [plan.settings])
    target = f"pushes it to `{plan.repository}` and promotes it to `{plan.tag}`" if plan.push else "pushes nothing"
    lines = [
        "## Plan",
        f"Builds and tests an image of **{config.fetch.model_id}** (`{plan.config}`, {config.quantize.scheme}), and "
        f"{target}.",
        f"Settings: `{plan.settings}`",
        *_reservations(asked, plan),
    ]
    wishes = {
        "Push the image to Docker Hub": [
            (asked.dockerhub_token, "secret `DOCKERHUB_TOKEN`: an access token with read and write"),
            (bool(asked.variables.get("DOCKERHUB_USERNAME")), "variable `DOCKERHUB_USERNAME`: the account's name"),
        ],
        "Build Llama 3.1 8B (`llama31-8b`)": [
            (asked.hf_token, "secret `HF_TOKEN`: a read token of an account with access to the model")
        ],
        "Build it on every push": [(bool(asked.variables.get("EMERALD_CONFIG")), "variable `EMERALD_CONFIG`")],
        "Deploy to AWS Lambda": [
            (bool(asked.variables.get("AWS_ROLE")), "variable `AWS_ROLE`: the role that deploy/lambda/README.md makes")
        ],
    }
    rows = [
        f"| {wish} | {'✅' if have else 'not set'} | {what} |" for wish, needs in wishes.items() for have, what in needs
    ]
    table = ["| to | | set under Settings, Secrets and variables, Actions |", "|---|---|---|", *rows]
    return "\n\n".join([*lines, "\n".join(table)]) + "\n"


def _reservations(asked: Asked, plan: Plan) -> list[str]:
    """What a private repository does without, and how to have it."""
    if not asked.private:
        return []
    lines = [
        f"This repository is private: what was built is kept for {plan.retention_days} days, and then built again."
    ]
    if not plan.attest:
        lines.append(
            "Nothing is attested, which takes GitHub Enterprise Cloud; with it, set the variable `EMERALD_ATTEST` to "
            "`true`."
        )
    if not plan.sign:
        lines.append(
            "The image is not signed: that would write this repository's name into Sigstore's public log. If it may, "
            "set the variable `EMERALD_SIGN` to `true`."
        )
    return lines


def _append(variable: str, text: str) -> None:
    if file := os.environ.get(variable):
        with Path(file).open("a", encoding="utf-8") as opened:
            opened.write(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
