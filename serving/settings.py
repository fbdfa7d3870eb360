"""Everything that whoever runs the server can set, read from the environment once."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from model.errors import InputError
from model.fields import Checked, Range, parse_value


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """Where the artifacts are and how to serve them."""

    build: str = "build/embedded"
    """EMERALD_BUILD: a folder with engine, embedder and cache."""
    host: str = "127.0.0.1"
    """HOST: address to listen on."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """PORT."""
    threads: Annotated[int, Range(0, 1024)] = 0
    """EMERALD_THREADS: 0 uses every core this process may run on."""
    waiting_max: Annotated[int, Range(0, 10000)] = 16
    """EMERALD_WAITING: requests that may wait for the model; more are refused with 429."""
    reply_tokens_max: Annotated[int, Range(1, 131072)] = 512
    """EMERALD_REPLY_TOKENS: most tokens of one reply, and the default."""
    revoked: str = ""
    """EMERALD_REVOKED: ids of ready answers that are no longer given, separated by commas."""

    @classmethod
    def from_environment(cls) -> "Settings":
        """Settings from the variables named above; InputError names a variable that cannot be read."""
        hints = cls.__annotations__
        values = {
            field: parse_value(variable, os.environ[variable], hints[field])
            for field, variable in VARIABLES.items()
            if variable in os.environ
        }
        return cls(**values)  # type: ignore[arg-type]

    @property
    def revoked_entries(self) -> frozenset[str]:
        """The ids in `revoked`."""
        return frozenset(filter(None, (name.strip() for name in self.revoked.split(","))))

    def folder(self, name: str) -> Path:
        """One artifact's folder; InputError if nothing was built there."""
        path = Path(self.build) / name
        if not path.is_dir():
            raise InputError(f'no {path}: run "make pipeline", or set EMERALD_BUILD to a build folder')
        return path


VARIABLES = {
    "build": "EMERALD_BUILD",
    "host": "HOST",
    "port": "PORT",
    "threads": "EMERALD_THREADS",
    "waiting_max": "EMERALD_WAITING",
    "reply_tokens_max": "EMERALD_REPLY_TOKENS",
    "revoked": "EMERALD_REVOKED",
}
