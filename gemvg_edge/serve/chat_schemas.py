"""Bodies of `/v1/chat/completions` and `/v1/models` as pydantic has them; OpenAI's names, and some of ours."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from gemvg_edge.serve.schemas import Answer, Body, LookOptions, Whole

Number = Annotated[float, Field(allow_inf_nan=False)]
Tokens = Annotated[Whole, Field(ge=1)]
Nothing = Annotated[list[str], Field(max_length=0)]


class ImageUrl(Body):
    """A picture."""

    url: str = Field(description="a data URL; nothing is fetched")
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Body):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(Body):
    """Words of a message."""

    type: Literal["text"]
    text: str


class Asked(Body):
    """What the user says."""

    role: Literal["user"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None


class Said(BaseModel):
    """What the user was answered, with all that an answer has; others' words are refused with the reason."""

    role: Literal["assistant", "system", "developer", "tool", "function"]


Turn = Annotated[Asked | Said, Field(discriminator="role")]


class ResponseFormat(Body):
    """How the answer is written."""

    type: Literal["text", "json_object"]


class StreamOptions(Body):
    """What a stream has."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatBody(LookOptions):
    """A chat. Of OpenAI's further fields those are taken that do not change a greedy answer, or say no to something.

    Ours, by `extra_body`: think, constrained, max_pixels, keep, pruning, timeout.
    """

    model: str
    messages: list[Turn] = Field(min_length=1)
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    think: bool = Field(False, description="let the model reason before it answers")
    constrained: bool = Field(True, description="decode only what an answer's grammar allows")

    n: Annotated[Whole, Field(ge=1, le=1)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    seed: Whole | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    stop: Nothing | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: Literal[False] | None = None
    logit_bias: dict[str, Number] | None = Field(None, max_length=0)
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    service_tier: str | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class MessageOut(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    grounding: Answer


class Choice(BaseModel):
    """The one answer."""

    model_config = ConfigDict(extra="allow")
    index: Literal[0]
    message: MessageOut
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """An answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ModelOut(BaseModel):
    """A model, and what it sees."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: str
    shipped: bool
    engine: str
    version: str
    max_pixels: int
    trained_pictures: int | None
    limits: dict[str, float]


class Models(BaseModel):
    """The one model."""

    object: Literal["list"]
    data: list[ModelOut]
