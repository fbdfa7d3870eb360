"""Decides what a run of the pipeline workflow does, and says what it lacks for more: python3 -m pipeline.workflow.plan.

Reads what GitHub gives a job (the dispatch's inputs, the repository's variables, whether secrets are set) and writes
the outputs `config`, `settings`, `push`, `repository`, `registry`, `tag`. A fork without a single secret gets a green
run that builds and tests its image and pushes nothing; the job summary then names what to set for what. A configuration
that cannot be built, for want of a token or by a setting out of range, is an error before any machine time is spent.
"""

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import InputError
from pipeline.configs import Config, named_config, with_settings

DEFAULT_CPU = "aarch64"
"""What programs are compiled for unless the variable EMERALD_CPU names another family: every Arm server since
Graviton 2 runs it, and KleidiAI picks its kernels for the CPU it meets."""
AS_CONFIGURED = "as configured"
REPOSITORY = re.compile(r"[a-z0-9.:-]+(?:/[a-z0-9._-]+)+")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What GitHub tells a job; `inputs` is empty on a push."""

    event: str
    inputs: Mapping[str, Any]
    variables: Mapping[str, str]
    dockerhub_token: bool
    hf_token: bool

    @classmethod
    def from_environment(cls) -> "Asked":
        return cls(
            event=os.environ["GITHUB_EVENT_NAME"],
            inputs=json.loads(os.environ["INPUTS"]) or {},
            variables=json.loads(os.environ["VARIABLES"]) or {},
            dockerhub_token=os.environ["HAS_DOCKERHUB_TOKEN"] == "true",
            hf_token=os.environ["HAS_HF_TOKEN"] == "true",
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does."""

    config: str
    settings: str
    """STAGE.FIELD=VALUE, separated by semicolons, as --set takes them."""
    push: bool
    repository: str
    """Where the image goes, such as docker.io/NAME/emerald; empty if nowhere."""
    tag: str


def main() -> int:
    """Writes the outputs and the summary; 2 if what was asked for cannot be done."""
    try:
        asked = Asked.from_environment()
        plan = planned(asked)
    except InputError as fault:
        print(f"::error::{fault}", flush=True)
        return 2
    outputs = {**vars(plan), "push": json.dumps(plan.push), "registry": plan.repository.partition("/")[0]}
    _append("GITHUB_OUTPUT", "".join(f"{name}={value}\n" for name, value in outputs.items()))
    _append("GITHUB_STEP_SUMMARY", summary(asked, plan))
    print(summary(asked, plan), flush=True)
    return 0


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
    repository = _repository(asked) if wished and account else ""
    return Plan(config=name, settings=settings, push=bool(repository), repository=repository, tag=tag)


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


def _repository(asked: Asked) -> str:
    """EMERALD_IMAGE, or the user's own on Docker Hub. A first part without a dot or a port is a name there, too."""
    name = asked.variables.get("EMERALD_IMAGE") or f"{asked.variables['DOCKERHUB_USERNAME'].lower()}/emerald"
    if not REPOSITORY.fullmatch(name):
        raise InputError(f"variable EMERALD_IMAGE = {name!r}: expected REGISTRY/NAMESPACE/NAME in lower case, no tag")
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


def _append(variable: str, text: str) -> None:
    if file := os.environ.get(variable):
        with Path(file).open("a", encoding="utf-8") as opened:
            opened.write(text)


if __name__ == "__main__":
    sys.exit(main())
