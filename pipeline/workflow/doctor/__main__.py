"""Says what this machine, fork or runner lacks for a build, and the remedy: python3 -m pipeline.workflow.doctor.

Takes seconds, before anything is installed: it uses the standard library alone. It looks at the machine, at the
repository's settings and workflows on GitHub, at the variables that a fork sets, and at what the registry and the
model hub let the credentials do; each only as far as it is there to be looked at. pipeline.workflow.probe asks less, in
every job: whether the runner at hand is large enough.
"""

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence

from pipeline.install import NEWEST, OLDEST, VENV
from pipeline.workflow.doctor.findings import Finding, error, ok, tell

DESCRIPTION = """Says what this machine, fork or runner lacks for a build, and what to do about it.
Nothing is installed, built or changed."""

EPILOG = """what is looked at, as far as it is there:
  the machine       Python, compiler, processor, memory, disk, Docker
  the fork          with GITHUB_REPOSITORY and GITHUB_TOKEN: its settings, and workflows that are switched off
  variables         in the environment: DOCKERHUB_USERNAME, EMERALD_IMAGE, EMERALD_CONFIG, EMERALD_SETTINGS,
                    EMERALD_CPU, EMERALD_ATTEST, EMERALD_SIGN, EMERALD_ARTIFACT_GB, AWS_ROLE, AWS_REGION,
                    EMERALD_API_KEYS
  secrets           whether they are set: HAS_DOCKERHUB_TOKEN and HAS_HF_TOKEN, true or false
  the registry      with DOCKERHUB_TOKEN or the credentials of docker login: whether they may push the image
  the model         from a hub, with HF_TOKEN: whether it may be read

examples:
  python3 -m pipeline.workflow.doctor
  python3 -m pipeline.workflow.doctor --config llama31-8b --set quantize.scheme=int4-channel
  EMERALD_IMAGE=ghcr.io/dorothy/emerald python3 -m pipeline.workflow.doctor

exit codes: 0 nothing stops the build (there may be warnings), 2 something will"""


def main(arguments: Sequence[str] = ()) -> int:
    """Tells every finding; 0 if nothing stops the build, 2 if something will."""
    parser = argparse.ArgumentParser(
        prog="python3 -m pipeline.workflow.doctor",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="embedded", metavar="NAME", help="the configuration (default: embedded)")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="STAGE.FIELD=VALUE",
        help="a changed field; repeatable, or several separated by semicolons",
    )
    options = parser.parse_args(arguments)
    findings = [python()]
    if sys.version_info[:2] >= OLDEST:  # an older Python cannot even read the other checks
        findings += examined(options.config, options.settings)
    return tell(findings)


def python() -> Finding:
    """A Python that the packages are there for, with what Debian and Ubuntu ship apart from it."""
    found = platform.python_version()
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        span = " to ".join(".".join(map(str, version)) for version in (OLDEST, NEWEST))
        return error("Python", found, f"install {span}, and name it: make setup PYTHON=python3.12")
    if importlib.util.find_spec("ensurepip") is None and not VENV.exists():
        return error("Python", f"{found} without its module venv", "apt-get install python3-venv")
    return ok("Python", found)


def examined(name: str, settings: Sequence[str]) -> "list[Finding]":
    """Everything else. A configuration that does not exist is an error, and the rest is looked at all the same."""
    from model.cpu import family
    from model.errors import InputError
    from pipeline.configs import named_config, with_settings
    from pipeline.workflow.doctor.access import fork, model, registry
    from pipeline.workflow.doctor.machine import machine
    from pipeline.workflow.doctor.variables import variables
    from pipeline.workflow.probe import NEEDS

    wrong = []
    try:
        config = with_settings(named_config(name), list(settings))
    except InputError as fault:
        wrong = [error("configuration", str(fault))]
        name, config = "embedded", named_config("embedded")
    target = family() if config.export.cpu == "native" else config.export.cpu
    return [
        *wrong,
        *machine(NEEDS[name], target),
        *fork(os.environ),
        *variables(os.environ),
        *registry(os.environ),
        *model(os.environ, config),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
