"""Everything that whoever runs the server can set, read from the environment once."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

from model.errors import InputError
from model.fields import Checked, Range, parse_value


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """Where the artifacts are and how to serve them."""

    build: str = "build/embedded"
    """EMERALD_BUILD: build folder to serve."""
    host: str = "127.0.0.1"
    """HOST: address to listen on."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """PORT: port to listen on; 0 takes a free one and says which."""
    threads: Annotated[int, Range(0, 1024)] = 0
    """EMERALD_THREADS: CPU threads of the model; 0 uses every core this process may run on."""
    running_max: Annotated[int, Range(1, 1024)] = 8
    """EMERALD_RUNNING: replies that are generated at once, in one batch."""
    contexts: Annotated[int, Range(1, 1024)] = 4
    """EMERALD_CONTEXTS: size of the KV cache, in conversations of full length; shorter ones share it."""
    waiting_max: Annotated[int, Range(0, 10000)] = 32
    """EMERALD_WAITING: requests that may wait for the model; more get 429."""
    per_key_max: Annotated[int, Range(1, 10000)] = 16
    """EMERALD_PER_KEY: requests of one API key at once; more get 429."""
    prompt_tokens_max: Annotated[int, Range(1)] | None = None
    """EMERALD_PROMPT_TOKENS: longest prompt, persona included; none leaves it to the model's context."""
    reply_tokens_max: Annotated[int, Range(1, 131072)] = 512
    """EMERALD_REPLY_TOKENS: most tokens of one reply, and the default."""
    reply_seconds: Annotated[float, Range(0.1, 86400)] = 300.0
    """EMERALD_REPLY_SECONDS: longest time of a reply, waiting included; it is cut there, finish reason "length"."""
    body_bytes_max: Annotated[int, Range(1024, 1 << 30)] = 1 << 20
    """EMERALD_BODY_BYTES: largest request body; larger ones get 413."""
    receive_seconds: Annotated[float, Range(0.1, 3600)] = 20.0
    """EMERALD_RECEIVE_SECONDS: how long a client may take to send its request; slower ones get 408."""
    drain_seconds: Annotated[float, Range(0, 3600)] = 30.0
    """EMERALD_DRAIN_SECONDS: how long a stopping server lets replies finish."""
    api_keys: str = ""
    """EMERALD_API_KEYS: SHA-256 of every accepted key, separated by commas; without any, no key is asked for."""
    api_keys_file: str = ""
    """EMERALD_API_KEYS_FILE: the same, one a line, from a file."""
    cors_origins: str = ""
    """EMERALD_CORS_ORIGINS: web origins whose pages may call this server, separated by commas; none by default."""
    system_prompt: bool = False
    """EMERALD_SYSTEM_PROMPT: true lets requests bring a system prompt of their own instead of the persona's."""
    log_prompts: bool = False
    """EMERALD_LOG_PROMPTS: true writes what users say into the log; otherwise its length and a digest."""
    grams_per_kwh: Annotated[float, Range(0, 5000)] = 415.755
    """EMERALD_GRAMS_PER_KWH: carbon intensity of the grid; the default is that of AWS's us-east-1."""
    revoked: str = ""
    """EMERALD_REVOKED: ids of ready answers that are no longer given, separated by commas; no rebuild needed."""

    @classmethod
    def from_environment(cls) -> "Settings":
        """Settings from the variables named above; InputError names a variable that cannot be read."""
        hints = get_type_hints(cls, include_extras=True)
        values = {
            field: parse_value(variable, os.environ[variable], hints[field])
            for field, variable in VARIABLES.items()
            if variable in os.environ
        }
        return cls(**values)  # type: ignore[arg-type]

    @property
    def revoked_entries(self) -> frozenset[str]:
        """The ids in `revoked`."""
        return frozenset(_listed(self.revoked))

    @property
    def origins(self) -> list[str]:
        """The origins in `cors_origins`; InputError for one that a browser would never send."""
        for origin in _listed(self.cors_origins):
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise InputError(f"EMERALD_CORS_ORIGINS: {origin!r} is no origin; write it as https://example.org")
        return _listed(self.cors_origins)

    @property
    def key_digests(self) -> list[str]:
        """SHA-256 of the accepted keys, from variable and file; InputError for what is none."""
        listed = _listed(self.api_keys)
        if self.api_keys_file:
            try:
                lines = Path(self.api_keys_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as fault:
                raise InputError(f"EMERALD_API_KEYS_FILE: {self.api_keys_file} cannot be read ({fault})") from fault
            listed += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not listed:
                raise InputError(f"EMERALD_API_KEYS_FILE: {self.api_keys_file} holds no key; unset it to ask for none")
        for number, digest in enumerate(listed, start=1):
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise InputError(
                    f"API key {number} is no SHA-256 in hexadecimal: keys are kept as digests; make one with "
                    '"python -m serving key"'
                )
        return listed

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
    "running_max": "EMERALD_RUNNING",
    "contexts": "EMERALD_CONTEXTS",
    "waiting_max": "EMERALD_WAITING",
    "per_key_max": "EMERALD_PER_KEY",
    "prompt_tokens_max": "EMERALD_PROMPT_TOKENS",
    "reply_tokens_max": "EMERALD_REPLY_TOKENS",
    "reply_seconds": "EMERALD_REPLY_SECONDS",
    "body_bytes_max": "EMERALD_BODY_BYTES",
    "receive_seconds": "EMERALD_RECEIVE_SECONDS",
    "drain_seconds": "EMERALD_DRAIN_SECONDS",
    "api_keys": "EMERALD_API_KEYS",
    "api_keys_file": "EMERALD_API_KEYS_FILE",
    "cors_origins": "EMERALD_CORS_ORIGINS",
    "system_prompt": "EMERALD_SYSTEM_PROMPT",
    "log_prompts": "EMERALD_LOG_PROMPTS",
    "grams_per_kwh": "EMERALD_GRAMS_PER_KWH",
    "revoked": "EMERALD_REVOKED",
}


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
