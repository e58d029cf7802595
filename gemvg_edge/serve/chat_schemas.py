"""Bodies of `/v1/chat/completions` and `/v1/models` as pydantic has them; OpenAI's names, and three of ours."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from gemvg_edge.serve.schemas import Answer, Body, Whole

Number = Annotated[float, Field(allow_inf_nan=False)]


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


class Turn(Body):
    """What the user said, or was answered."""

    role: Literal["user", "assistant"]
    content: str | list[TextPart | ImagePart]
    name: str | None = None


class ResponseFormat(Body):
    """How the answer is written."""

    type: Literal["text", "json_object"]


class StreamOptions(Body):
    """What a stream has."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatBody(Body):
    """A chat; further fields of OpenAI's are refused, unless they cannot change the answer."""

    model: str
    messages: list[Turn] = Field(min_length=1)
    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    n: Annotated[Whole, Field(ge=1, le=1)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    seed: Whole | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    think: bool = Field(False, description="let the model reason before it answers (ours, by `extra_body`)")
    constrained: bool = Field(True, description="decode only what an answer's grammar allows (ours)")
    max_pixels: Whole | None = Field(None, ge=1, le=2**31, description="budget of each picture (ours)")


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
    max_pixels: int
    trained_pictures: int | None


class Models(BaseModel):
    """The one model."""

    object: Literal["list"]
    data: list[ModelOut]
