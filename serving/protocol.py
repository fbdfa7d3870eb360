"""What clients may send: OpenAI's shapes, each written once.

Whatever is not supported is refused by name, never ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from model.errors import InputError
from model.sampling import Sampling
from model.tokenizer import Message
from serving.settings import Settings


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
StopText = Annotated[str, Field(max_length=500), AfterValidator(_encodable)]
"""Every token of a reply is compared with it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorDetail(_Strict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Strict):
    """The body of every error."""

    error: ErrorDetail


class TextPart(_Strict):
    """A part of a message; text is the only kind that is read."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """One turn. The fields that are null in OpenAI's own answers may come back as null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def plain(self) -> Message:
        """Role and text."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": text}


class StreamOptions(_Strict):
    """OpenAI's options of a streamed reply."""

    include_usage: bool = False


class EmeraldOptions(_Strict):
    """What no other server has."""

    cache: bool = True
    """False asks the model even if there is a ready answer."""
    choices: Annotated[dict[str, str], Field(max_length=100)] = {}
    """The visitor's choices in the prologue, by scene; they shape the system prompt."""


class _Generation(_Strict):
    """What chat and plain completions share."""

    model: Text | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Literal[1] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted for the caller's own records; not used."""

    @property
    def longest(self) -> int | None:
        """The longest reply that is asked for."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likeliest tokens to report beside each; None reports nothing."""
        return None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, settings: Settings, unless_given: Mapping[str, Any]) -> Sampling:
        """The request's wishes, before others' and `Sampling`'s own; InputError names one that is out of range."""
        longest = self.longest or settings.reply_tokens_max
        if longest > settings.reply_tokens_max:
            raise InputError(f"max_tokens = {longest}: this server gives at most {settings.reply_tokens_max}")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        names = {field.name for field in fields(Sampling)} - {"max_tokens", "stop", "logprobs"}
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return Sampling(**{**unless_given, **given}, max_tokens=longest, stop=tuple(stop), logprobs=self.alternatives)


class ChatRequest(_Generation):
    """The supported part of OpenAI's chat completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    emerald: Annotated[EmeraldOptions, Field(default_factory=EmeraldOptions)]

    @property
    def longest(self) -> int | None:
        """The longest reply that is asked for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likeliest tokens to report beside each; None reports nothing."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("top_logprobs: it needs logprobs to be true")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def takes_ready_answers(self) -> bool:
        """Whether the cache may answer: not if it is bypassed, nor for another persona than the one it speaks as."""
        return self.emerald.cache and not self.own_system_prompt

    @property
    def own_system_prompt(self) -> bool:
        """Whether somebody else than the persona is to speak."""
        return self.messages[0].plain()["role"] == "system"

    def conversation(self, settings: Settings) -> list[Message]:
        """The turns, oldest first; InputError for a system prompt where none is allowed."""
        return _turns(self.messages, settings)


class TextRequest(_Generation):
    """The supported part of OpenAI's completions: plain text goes on, without persona or cache."""

    prompt: Annotated[Text, Field(min_length=1)] | Annotated[list[int], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = False

    @property
    def alternatives(self) -> int | None:
        """How many likeliest tokens to report beside each; None reports nothing."""
        return self.logprobs


class TokenizeRequest(_Strict):
    """Text, or a conversation as the chat template writes it, with the persona in front."""

    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)] | None = None

    def wanted(self, settings: Settings) -> str | list[Message]:
        """The text, or the turns as `ChatRequest.conversation` has them; InputError unless it is one of them."""
        if self.messages is not None and self.prompt is None:
            return _turns(self.messages, settings)
        if self.prompt is not None and self.messages is None:
            return self.prompt
        raise InputError("give either prompt or messages")


class DetokenizeRequest(_Strict):
    """Tokens."""

    tokens: list[Annotated[int, Field(ge=0)]]


def refusal(errors: list[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Message and parameter for what pydantic found first; its input, which is the user's text, is left out."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "extra_forbidden":
        return f"{place}: not supported by this server; leave it out", place
    return f"{place or 'body'}: {first['msg'].removeprefix('Value error, ')}", place or None


def _turns(messages: Sequence[ChatMessage], settings: Settings) -> list[Message]:
    turns = [message.plain() for message in messages]
    systems = [at for at, turn in enumerate(turns) if turn["role"] == "system"]
    if systems and not settings.system_prompt:
        raise InputError(
            f"messages.{systems[0]}.role: this server speaks as its own persona and takes no system prompt "
            "(whoever runs it can allow them with EMERALD_SYSTEM_PROMPT=true)"
        )
    if systems not in ([], [0]) or len(turns) == len(systems):
        raise InputError("messages: a system prompt comes first, once, and a user message after it")
    return turns
