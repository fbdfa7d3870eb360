"""Events as AWS sends them."""

import base64
import json
from typing import Any

from tests.lambda_.management import STAGE

Event = dict[str, Any]


def websocket(route: str, connection: str, body: object = None, **fields: Any) -> Event:
    """Of a WebSocket API with proxy integrations; a `body` that is no text becomes JSON."""
    kinds = {"$connect": "CONNECT", "$disconnect": "DISCONNECT"}
    event = {
        "requestContext": {
            "routeKey": route,
            "eventType": kinds.get(route, "MESSAGE"),
            "extendedRequestId": "JKlmnoPQ=",
            "requestTime": "28/Nov/2026:12:00:00 +0000",
            "messageDirection": "IN",
            "stage": STAGE,
            "connectedAt": 1795867200000,
            "requestTimeEpoch": 1795867200000,
            "identity": {"sourceIp": "192.0.2.7"},
            "requestId": f"request-of-{connection}",
            "domainName": "abcdef1234.execute-api.us-east-1.amazonaws.com",
            "connectionId": connection,
            "apiId": "abcdef1234",
        },
        "isBase64Encoded": False,
        **fields,
    }
    if body is not None:
        event["body"] = body if isinstance(body, str) else json.dumps(body)
    return event


def chat(connection: str, question: str, *, name: str = "q", **fields: Any) -> Event:
    """A question, delivered asynchronously as the template has it."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24, **fields}
    message = {"action": "chat", "id": name, "body": body}
    return websocket("$default", connection, message, invocation="Event")


def prologue(connection: str, name: str = "p") -> Event:
    return websocket("$default", connection, {"action": "prologue", "id": name}, invocation="Event")


def http(method: str, path: str, body: object = None, *, encode: bool = False, **headers: str) -> Event:
    """Of an HTTP API or a function URL: payload format 2.0."""
    event: Event = {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": "",
        "headers": {"content-type": "application/json", "host": "abc.lambda-url.us-east-1.on.aws", **_named(headers)},
        "requestContext": {
            "accountId": "123456789012",
            "apiId": "abc",
            "domainName": "abc.lambda-url.us-east-1.on.aws",
            "http": {
                "method": method,
                "path": path,
                "protocol": "HTTP/1.1",
                "sourceIp": "192.0.2.7",
                "userAgent": "test",
            },
            "requestId": "http-request",
            "routeKey": "$default",
            "stage": "$default",
            "time": "28/Nov/2026:12:00:00 +0000",
            "timeEpoch": 1795867200000,
        },
        "isBase64Encoded": encode,
    }
    if body is not None:
        text = body if isinstance(body, str) else json.dumps(body)
        event["body"] = base64.b64encode(text.encode()).decode() if encode else text
    return event


def rest(method: str, path: str, body: object = None, **headers: str) -> Event:
    """Of a REST API: payload format 1.0."""
    return {
        "resource": "/{proxy+}",
        "path": path,
        "httpMethod": method,
        "headers": {
            "Content-Type": "application/json",
            "Host": "abc.execute-api.us-east-1.amazonaws.com",
            **_named(headers),
        },
        "multiValueHeaders": {"Content-Type": ["application/json"]},
        "queryStringParameters": None,
        "multiValueQueryStringParameters": None,
        "pathParameters": {"proxy": path.lstrip("/")},
        "stageVariables": None,
        "requestContext": {
            "accountId": "123456789012",
            "apiId": "abc",
            "domainName": "abc.execute-api.us-east-1.amazonaws.com",
            "httpMethod": method,
            "identity": {"sourceIp": "192.0.2.7", "userAgent": "test"},
            "path": f"/live{path}",
            "requestId": "rest-request",
            "resourcePath": "/{proxy+}",
            "stage": "live",
        },
        "body": None if body is None else json.dumps(body),
        "isBase64Encoded": False,
    }


def _named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}
