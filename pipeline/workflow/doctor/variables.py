"""Mistakes in the variables that a fork sets for its workflows, each with the value that was probably meant.

A workflow hands a variable to a job as an environment variable of the same name, so the same check runs anywhere.
Values that may be keys are never printed.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping

from model.cpu import COMPILER_FLAGS
from model.errors import InputError
from pipeline.configs import CONFIGS, named_config, with_settings
from pipeline.workflow.doctor.findings import Finding, error, ok, warning
from pipeline.workflow.plan import REPOSITORY, repository_of

Environment = Mapping[str, str]

HUB = "docker.io"
HUB_PAGE = re.compile(r"hub\.docker\.com/(?:r|repository/docker)/")
TAG_OR_DIGEST = re.compile(r"(?:@sha256:[^/]*|:[^/:]*)+$")
TOKEN = re.compile(r"\b(?:dckr_[a-z]+_|gh[oprsu]_\w{20}|github_pat_|hf_\w{20}|AKIA[0-9A-Z]{16})")
"""How access tokens begin that are often pasted into the wrong field."""
ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+", re.ASCII)
REGION = re.compile(r"[a-z]{2,4}(?:-[a-z]+)+-\d")
DIGEST = re.compile(r"\b[0-9a-f]{64}\b")
PAGE = "Settings, Secrets and variables, Actions"
ELSEWHERE = ("AWS_ROLE", "AWS_REGION", "EMERALD_API_KEYS", "EMERALD_ATTEST", "EMERALD_SIGN")
"""Variables that some forks or workflows use, and others do not."""


def variables(environment: Environment) -> Iterator[Finding]:
    """Everything about the variables that are set; GitHub hands on an unset one as an empty text."""
    for name in CHECKS:
        if value := environment.get(name):
            yield from variable(name, value, environment)
    yield from docker_credentials(environment)


def variable(name: str, value: str, environment: Environment) -> Iterator[Finding]:
    """All that is wrong with one variable, or that nothing is."""
    thing, report = f"variable {name}", warning if _stops_nothing(name, environment) else error
    if TOKEN.search(value):
        remedy = "delete the variable, revoke that token, and set a new one as a secret, which logs do not show"
        yield error(thing, "it holds an access token", remedy)
        return
    if name == "EMERALD_SETTINGS":
        value = value.strip()  # as pipeline.workflow.plan does
    bare = re.sub(r"^(['\"`])(.*)\1$", r"\2", value.strip()).strip()
    mistakes = [mistake for mistake in (_outer(value, bare), CHECKS[name](bare, environment)) if mistake]
    shown = f"{len(value)} characters" if name == "EMERALD_API_KEYS" else repr(value)
    yield from (report(thing, shown, mistake) for mistake in mistakes)
    if not mistakes:
        yield ok(thing, shown)


def docker_credentials(environment: Environment) -> Iterator[Finding]:
    """Whether a user name and a token are there, or neither; half of them push nothing."""
    token, user = environment.get("HAS_DOCKERHUB_TOKEN"), environment.get("DOCKERHUB_USERNAME")
    half = "nothing will be pushed"
    if token == "true" and not user:
        remedy = f"set it to the account's name ({PAGE}, Variables)"
        yield warning("variable DOCKERHUB_USERNAME", f"not set, but the secret DOCKERHUB_TOKEN is: {half}", remedy)
    if token == "false" and user:
        remedy = f"make an access token with Read & Write in the account's settings, and set it ({PAGE}, Secrets)"
        yield warning("secret DOCKERHUB_TOKEN", f"not set, but the variable DOCKERHUB_USERNAME is: {half}", remedy)


def image_of(environment: Environment) -> tuple[str, str] | None:
    """Registry and name of the image that the workflows push; None if the variables name none."""
    try:
        registry, _, name = repository_of(environment).partition("/")
    except InputError:
        return None
    return registry, name


def _stops_nothing(name: str, environment: Environment) -> bool:
    """Whether the build does without it: deploying is a workflow of its own, and without a token nothing is pushed."""
    pushes = environment.get("HAS_DOCKERHUB_TOKEN") != "false"
    return name in ELSEWHERE or (not pushes and name in ("DOCKERHUB_USERNAME", "EMERALD_IMAGE"))


def _outer(value: str, bare: str) -> str:
    """What stands around the value, or parts it; GitHub hands it on as it is."""
    if "\n" in value.strip() or "\r" in value.strip():
        return "it has a line break inside: write it on one line"
    if value != value.strip():
        return "it has white space around it: set it again without"
    return "it has quotes around it, which become part of the value: set it again without" if value != bare else ""


def _user(value: str, environment: Environment) -> str:
    if "://" in value:
        return f"this is an address, and the account's name is asked for: write {value.rstrip('/').rpartition('/')[2]}"
    if value.startswith("@"):
        return f"write it without the @: {value.removeprefix('@')}"
    if environment.get("EMERALD_IMAGE") and (image_of(environment) or ("",))[0] != HUB:
        return ""  # other registries have user names of all kinds
    if "@" in value:
        return "this is an e-mail address: write the account's name, which is the first part of its images' names"
    if not re.fullmatch(r"[A-Za-z0-9._-]+", value):
        return "this is no account's name on Docker Hub, which has letters and digits"
    return ""


def _image(value: str, _environment: Environment) -> str:
    host, _, rest = value.partition("/")
    known = host in (HUB, "ghcr.io")
    if REPOSITORY.fullmatch(value) and not (known and "/" not in rest) and not HUB_PAGE.match(value):
        return ""
    meant = re.sub(r"^[a-z]+://", "", value.lower()).rstrip("/")
    meant = TAG_OR_DIGEST.sub("", HUB_PAGE.sub(f"{HUB}/", meant))
    suggestion = f": write {meant}" if meant != value and REPOSITORY.fullmatch(meant) else ""
    return f"expected REGISTRY/NAMESPACE/NAME in lower case, without https:// and without a tag{suggestion}"


def _config(value: str, _environment: Environment) -> str:
    return "" if value in CONFIGS else f"no such configuration: {_nearest(value, CONFIGS)}"


def _settings(value: str, environment: Environment) -> str:
    name = environment.get("EMERALD_CONFIG", "").strip()
    try:
        with_settings(named_config(name if name in CONFIGS else "embedded"), [value])
    except InputError as fault:
        return str(fault)
    return ""


def _cpu(value: str, _environment: Environment) -> str:
    choices = ("native", *COMPILER_FLAGS)
    return "" if value in choices else f"no such CPU family: {_nearest(value, choices)}"


def _role(value: str, _environment: Environment) -> str:
    if ROLE.fullmatch(value):
        return ""
    return "expected the ARN of a role, arn:aws:iam::123456789012:role/NAME (deploy/lambda/README.md makes one)"


def _region(value: str, _environment: Environment) -> str:
    if REGION.fullmatch(value):
        return ""
    zone = REGION.match(value)
    return f"expected the code of a region, such as us-east-1{f': write {zone[0]}' if zone else ''}"


def _keys(value: str, _environment: Environment) -> str:
    if value == "public":
        return ""
    wrong = [text for number, key in enumerate(value.split(","), start=1) if (text := _key(number, key.strip()))]
    return "; ".join(wrong)


def _key(number: int, key: str) -> str:
    """What is wrong with one digest, without a word of what may be the key itself."""
    found = DIGEST.search(key.lower())
    if key == "" or (found and key == found[0]):
        return ""
    if key.lower() == "public":
        return "write public, in small letters and alone, to let everyone in"
    if found:
        return f"key {number} is not just 64 digits in small letters: write {found[0]}"
    return f'key {number} is no SHA-256: make a key and its digest with "python -m serving key"'


def _switch(value: str, _environment: Environment) -> str:
    return "" if value in ("true", "false") else f"neither true nor false: {_nearest(value, ('true', 'false'))}"


def _gigabytes(value: str, _environment: Environment) -> str:
    return "" if re.fullmatch(r"\d+(\.\d+)?", value) else "expected a number of GB without a unit, such as 50"


def _nearest(value: str, choices: Collection[str]) -> str:
    """The choice that was probably meant, or all of them."""
    near = difflib.get_close_matches(value.lower(), choices, n=1)
    return f"write {near[0]}" if near else f"write one of {', '.join(choices)}"


CHECKS: dict[str, Callable[[str, Environment], str]] = {
    "DOCKERHUB_USERNAME": _user,
    "EMERALD_IMAGE": _image,
    "EMERALD_CONFIG": _config,
    "EMERALD_SETTINGS": _settings,
    "EMERALD_CPU": _cpu,
    "EMERALD_ATTEST": _switch,
    "EMERALD_SIGN": _switch,
    "EMERALD_ARTIFACT_GB": _gigabytes,
    "AWS_ROLE": _role,
    "AWS_REGION": _region,
    "EMERALD_API_KEYS": _keys,
}
"""What says of a value what is wrong with it and what to write, or nothing."""
