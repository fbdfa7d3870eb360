"""The trust policy of the AWS role that a repository's workflows take: python -m pipeline.workflow.oidc OWNER/NAME.

AWS recognises a workflow by the subject of the token that GitHub gives it, which names the repository and the branch.
Since 15 July 2026 that of a new repository holds numbers too, its owner's and its own, so that nobody who later takes
over a name is trusted: `repo:OWNER@ID/NAME@ID:ref:refs/heads/main`. Older ones keep `repo:OWNER/NAME:ref:…` until their
owner changes that. The policy accepts both forms of the one repository and branch, and nothing else.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from model.errors import InputError
from pipeline.progress import say
from pipeline.workflow.forge import Repository

PROVIDER = "token.actions.githubusercontent.com"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the policy as JSON; 0 done, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        found = Repository.named(options.repository).description()
        print(json.dumps(trust_policy(options.account, subjects(found, options.branch)), indent=2))
    except InputError as fault:
        say(f"error: {fault}")
        return 2
    return 0


def subjects(repository: dict[str, Any], branch: str) -> list[str]:
    """Both forms of the subject of a branch's workflows, from GitHub's description of the repository."""
    owner, name = repository["owner"], repository["name"]
    ref = f"ref:refs/heads/{branch}"
    plain = f"repo:{owner['login']}/{name}:{ref}"
    return [plain, f"repo:{owner['login']}@{owner['id']}/{name}@{repository['id']}:{ref}"]


def trust_policy(account: str, accepted: Sequence[str]) -> dict[str, Any]:
    """What `aws iam create-role --assume-role-policy-document` takes."""
    if not re.fullmatch(r"\d{12}", account):
        raise InputError(f"account {account!r}: an AWS account has 12 digits: aws sts get-caller-identity shows them")
    condition = {"StringEquals": {f"{PROVIDER}:aud": "sts.amazonaws.com", f"{PROVIDER}:sub": list(accepted)}}
    statement = {
        "Effect": "Allow",
        "Action": "sts:AssumeRoleWithWebIdentity",
        "Principal": {"Federated": f"arn:aws:iam::{account}:oidc-provider/{PROVIDER}"},
        "Condition": condition,
    }
    return {"Version": "2012-10-17", "Statement": [statement]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.workflow.oidc",
        description="Prints the trust policy of the AWS role that a repository's workflows may take.",
        epilog="environment: GITHUB_TOKEN, for a private repository",
    )
    parser.add_argument("repository", metavar="OWNER/NAME")
    parser.add_argument("--account", required=True, metavar="DIGITS", help="the AWS account")
    parser.add_argument("--branch", default="main", help="the branch that may deploy (default: main)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
