"""Text to tokens and back, and the chat template: `tokenizers` and `jinja2`, without `transformers`."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from model.artifact import read_json
from model.errors import InputError

Message = Mapping[str, str]
"""One turn of a conversation: {"role": "system" | "user" | "assistant", "content": text}."""
WORD_JOINER = "\N{WORD JOINER}"


class Tokenizer:
    """A model's tokenizer.json with the chat template and stop tokens that belong to it."""

    def __init__(self, fast: FastTokenizer, chat_template: str, special: Mapping[str, str], stop_tokens: Sequence[int]):
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        self._fast = fast
        self._marks = _marks(fast)
        self._template = environment.from_string(chat_template)
        self._special = special
        self.stop_tokens = frozenset(stop_tokens)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Reads tokenizer.json and chat.json (template, special tokens, stop tokens) from an artifact."""
        chat = read_json(folder / "chat.json")
        fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
        return cls(fast, chat["template"], chat["special"], chat["stop_tokens"])

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids; `add_special` prepends the beginning-of-text token where the model has one."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=add_special).ids
        return ids

    def plain(self, text: str) -> str:
        """The text with every special token's spelling broken by a word joiner: it is read as the letters it has.

        Whoever writes a message must not be able to end their turn in it, or to speak as someone else.
        """
        return self._marks.sub(lambda mark: f"{mark[0][0]}{WORD_JOINER}{mark[0][1:]}", text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, special ones left out; an unfinished UTF-8 sequence shows as U+FFFD."""
        return str(self._fast.decode(list(tokens), skip_special_tokens=True))

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The prompt text that asks the model for the next assistant turn."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except TemplateError as fault:
            raise InputError(f"the chat template refuses these messages: {fault}") from fault

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of `render_chat` of the messages as `plain` has them; the template writes the special tokens."""
        said = [{**message, "content": self.plain(message["content"])} for message in messages]
        return self.encode(self.render_chat(said), add_special=False)

    def encode_dialogue(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation up to the end of its last reply, and which of them the model has to say.

        Those are the replies and the token that ends each. Raises InputError if the template does not write a reply
        where it asks for one.
        """
        said = [{**message, "content": self.plain(message["content"])} for message in messages]
        text, spans = self.render_chat(said), []
        for count, message in enumerate(said):
            if message["role"] == "assistant":
                prompt = self.render_chat(said[:count])
                if not text.startswith(prompt + message["content"]):
                    raise InputError(f"the chat template writes a reply elsewhere: {message['content'][:60]!r}")
                spans.append((len(prompt), len(prompt) + len(message["content"])))
        encoded = self._fast.encode(text, add_special_tokens=False)
        ends = {end for _, end in spans}
        own = [
            first in ends or any(start <= first and last <= end for start, end in spans)
            for first, last in encoded.offsets
        ]
        length = len(own) - own[::-1].index(True)
        return encoded.ids[:length], own[:length]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; a special token's are those of its spelling, an unknown one has none."""
        spelling: str | None = self._fast.id_to_token(token)
        if spelling is None:
            return b""
        if all(letter in BYTE_OF for letter in spelling):
            return bytes(BYTE_OF[letter] for letter in spelling)
        return spelling.encode()


def _byte_letters() -> dict[str, int]:
    """Byte-level BPE writes bytes as letters: printable ones as themselves, the others from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


BYTE_OF = _byte_letters()


def _marks(fast: FastTokenizer) -> re.Pattern[str]:
    """Finds the special tokens as they are spelt."""
    spelt = [token.content for token in fast.get_added_tokens_decoder().values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(spelt, key=len, reverse=True))) if spelt else r"(?!)")


class TextStream:
    """Turns tokens into text as they come, never cutting a character: undecided bytes wait for the next token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._context: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        self._pending.append(token)
        text = self._new_text()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._pending) < 8:
            return ""
        self._context, self._pending = (self._context + self._pending)[-8:], []
        return text

    def flush(self) -> str:
        """What remains when no token follows; an unfinished character becomes U+FFFD."""
        text, self._pending = self._new_text(), []
        return text

    def _new_text(self) -> str:
        """Decoded beside a few earlier tokens, since some decoders treat the first token of a text specially."""
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]


def chat_settings(folder: Path) -> dict[str, Any]:
    """chat.json's content, gathered from a Hugging Face-style folder.

    Stop tokens are generation_config's, or config's, end-of-text ids together with the tokenizer's own.
    """
    config = _read_optional(folder / "tokenizer_config.json")
    special = {name: _token_text(config[name]) for name in ("bos_token", "eos_token") if config.get(name)}
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    stops: set[int | None] = set()
    for source in (_read_optional(folder / "generation_config.json"), _read_optional(folder / "config.json")):
        ids = source.get("eos_token_id")
        stops |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    stops |= {fast.token_to_id(special["eos_token"])} if "eos_token" in special else set()
    template = _chat_template(folder, config)
    known_stops = sorted(stop for stop in stops if stop is not None)
    if not template or not known_stops:
        lacks = "chat template" if not template else "end-of-text token"
        raise InputError(f"{folder}: no {lacks} in tokenizer_config.json; use an instruction-tuned (chat) model")
    return {"template": template, "special": special, "stop_tokens": known_stops}


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry["name"] == "default"), "")
    return str(template)


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _token_text(token: str | Mapping[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]


def _refuse(message: str) -> None:
    raise TemplateError(message)
