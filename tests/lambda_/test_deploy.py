"""deploy/lambda: the template as AWS transforms it, its mapping as API Gateway renders it, and what its README says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import airspeed
import pytest

from serving.settings import VARIABLES
from serving.websocket import FRAMES
from tests.conftest import ROOT
from tests.lambda_ import events
from tests.lambda_.emulator import Function
from tests.lambda_.management import STAGE, Management

DEPLOY = ROOT / "deploy/lambda"
TRANSFORM = """
import json, sys
from cfnlint.decode import cfn_yaml
from samtranslator.translator.transform import transform

class Policies:
    def load(self):
        return {}

template = json.loads(json.dumps(cfn_yaml.load(sys.argv[1])))
print(json.dumps(transform(template, json.loads(sys.argv[2]), Policies())))
"""


@pytest.fixture(scope="module")
def template() -> Any:
    """The template after AWS's own transformation, in plain CloudFormation."""
    return transformed(ImageUri=f"123456789012.dkr.ecr.us-east-1.amazonaws.com/emerald@sha256:{'0' * 64}")


def transformed(**parameters: str) -> Any:
    environment = {**os.environ, "AWS_DEFAULT_REGION": "us-east-1"}
    arguments = [str(DEPLOY / "template.yaml"), json.dumps(parameters)]
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORM, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def lint(path: Path, *options: str) -> str:
    linter = Path(sys.executable).parent / "cfn-lint"
    done = subprocess.run([str(linter), *options, str(path)], capture_output=True, text=True)
    return done.stdout + done.stderr


def test_the_template_passes_cfn_lint_before_and_after_its_transformation(template: Any, tmp_path: Path) -> None:
    assert lint(DEPLOY / "template.yaml") == ""
    (tmp_path / "plain.json").write_text(json.dumps(template))
    assert lint(tmp_path / "plain.json", "--ignore-checks", "W2001", "--") == "", "W2001: the transformation reads it"


def test_the_linter_sees_what_is_wrong(tmp_path: Path) -> None:
    wrong = (DEPLOY / "template.yaml").read_text().replace("      Timeout: 900", "      Timeouts: 900")
    (tmp_path / "template.yaml").write_text(wrong)
    assert "Timeouts" in lint(tmp_path / "template.yaml")


def test_the_function_may_post_to_its_own_connections_and_nothing_else(template: Any) -> None:
    role = template["Resources"]["StorytellerRole"]["Properties"]
    (statement,) = [one for policy in role["Policies"] for one in policy["PolicyDocument"]["Statement"]]
    assert statement["Action"] == "execute-api:ManageConnections"
    assert statement["Resource"]["Fn::Sub"].endswith(f":${{Api}}/{STAGE}/POST/@connections/*")
    assert [policy.rpartition("/")[2] for policy in role["ManagedPolicyArns"]] == ["AWSLambdaBasicExecutionRole"]
    may = template["Resources"]["ApiMayInvoke"]["Properties"]
    assert (may["Principal"], may["Action"]) == ("apigateway.amazonaws.com", "lambda:InvokeFunction")
    assert may["SourceArn"]["Fn::Sub"].endswith(f":${{Api}}/{STAGE}/*")


def test_the_url_is_closed_unless_a_key_is_asked_for(template: Any) -> None:
    resources, conditions = template["Resources"], template["Conditions"]
    urls = [one for one in resources.values() if one["Type"] == "AWS::Lambda::Url"]
    assert [(url["Condition"], url["Properties"]["AuthType"]) for url in urls] == [
        ("HasUrl", {"Fn::If": ["SignedUrl", "AWS_IAM", "NONE"]})
    ]
    assert template["Parameters"]["FunctionUrl"]["Default"] == "iam"
    assert conditions["SignedUrl"] == {"Fn::Equals": [{"Ref": "FunctionUrl"}, "iam"]}
    everyone = [one for one in resources.values() if one.get("Properties", {}).get("Principal") == "*"]
    assert {one["Condition"] for one in everyone} == {"UrlWithKeys"}
    assert "Default" not in template["Parameters"]["ApiKeys"], "who deploys decides who gets in"


def test_sizes_and_settings(template: Any) -> None:
    function = template["Resources"]["Storyteller"]["Properties"]
    assert (function["Architectures"], function["Timeout"], function["PackageType"]) == (["arm64"], 900, "Image")
    assert set(function["Environment"]["Variables"]) <= set(VARIABLES.values())
    parameters = template["Parameters"]
    assert (parameters["MemoryMegabytes"]["Default"], parameters["SnapStart"]["Default"]) == (10240, "off")
    assert parameters["ReplySeconds"]["MaxValue"] < function["Timeout"]
    assert template["Resources"]["Log"]["Properties"]["RetentionInDays"] == {"Ref": "LogDays"}
    assert template["Resources"]["Delivery"]["Properties"]["MaximumRetryAttempts"] == 0
    routes = [one["Properties"] for one in template["Resources"].values() if one["Type"] == "AWS::ApiGatewayV2::Route"]
    assert {route["RouteKey"] for route in routes} == {"$connect", "$disconnect", "$default"}


class Util:
    """API Gateway's $util, as far as the mapping uses it: what Java's commons-lang escapes."""

    def escapeJavaScript(self, text: str) -> str:  # noqa: N802  # its name there
        return json.dumps(text)[1:-1].replace("'", r"\'").replace("/", r"\/")


def rendered(template: Any, connection: str, body: str) -> Any:
    """The event that API Gateway makes of a message."""
    delivered = template["Resources"]["Delivered"]["Properties"]
    assert delivered["RequestParameters"] == {"integration.request.header.X-Amz-Invocation-Type": "'Event'"}
    context = events.websocket("$default", connection)["requestContext"]
    mapping = airspeed.Template(delivered["RequestTemplates"]["$default"])
    return json.loads(mapping.merge({"context": context, "util": Util(), "input": {"body": body}}))


@pytest.mark.parametrize(
    "body",
    [
        "",
        "it's",
        r"\'",
        r"\\''\\\'",
        '"quoted" and \\"',
        "line\nline\r\n\ttab / slash",
        "émeraude 🙂 \u2028",
        "$x #if(1) $util.x #end ${y}",
        '{"action": "prologue"}',
    ],
)
def test_any_message_reaches_the_function_as_it_was_sent(template: Any, body: str) -> None:
    event = rendered(template, "c", body)
    assert event["body"] == body
    sent = events.websocket("$default", "c")["requestContext"]
    assert event["requestContext"].items() <= sent.items()


def test_a_mapped_message_is_answered(template: Any, function: Function, management: Management) -> None:
    question = {"messages": [{"role": "user", "content": "What's \"it\" like, 'inside' the city? 🙂"}], "max_tokens": 2}
    event = rendered(template, "mapped", json.dumps({"action": "chat", "id": "it's", "body": question}))
    assert event["invocation"] == "Event"
    assert function.invoke(event) == {"statusCode": 200}
    frames = management.received("mapped")
    assert (frames[0]["request"], frames[-1]["type"]) == ("it's", "done")


def test_the_readme_documents_every_frame() -> None:
    _, _, readme = (DEPLOY / "README.md").read_text(encoding="utf-8").partition("**Frames**")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", readme, re.MULTILINE)
    documented = {kind: set(re.findall(r"`(\w+)`", fields)) for kind, fields in rows}
    assert documented == {kind: set(fields) for kind, fields in FRAMES.items()}


def test_the_readme_documents_every_parameter(template: Any) -> None:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}" in readme for name in template["Parameters"])
