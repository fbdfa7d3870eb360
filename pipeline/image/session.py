"""Asks a running container questions through its own Python: it has no network that could be asked over."""

import json
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from docker.errors import APIError
from docker.models.containers import Container

PROBE = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")


class Session:
    """A running container and the probe in it."""

    def __init__(self, container: Container) -> None:
        self.container = container

    def probe(self, command: str, *arguments: Any) -> Iterator[dict[str, Any]]:
        """What `probe.py`'s command finds, as it finds it; nothing more once the container ends."""
        told = [json.dumps(argument) for argument in arguments]
        try:
            _, output = self.container.exec_run(
                ["python", "-S", "-c", PROBE, command, *told], stream=True, stderr=False
            )
        except APIError as fault:
            if fault.status_code == HTTPStatus.CONFLICT:  # it has ended
                return
            raise
        rest = b""
        for chunk in cast("Iterator[bytes]", output):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield json.loads(line)
