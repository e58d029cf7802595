"""Bodies of `/v1/ground` and `/v1/scenes` as pydantic has them: what comes in is checked, `/openapi.json` tells all."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Query = Annotated[str, Field(min_length=1, description="what to look for, in words; pictures count from 1 in it")]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, description="share of the visual tokens kept")]
Seconds = Annotated[float, Field(ge=0.1, allow_inf_nan=False, description="give up after so many seconds")]


def whole(value: Any) -> Any:
    """1.0 as 1: JSON has one kind of numbers."""
    return int(value) if type(value) is float and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(whole)]
Pixels = Annotated[Whole, Field(ge=1, le=2**31, description="budget of each picture, after resizing")]


class Body(BaseModel):
    """What a client sends: nothing is guessed, and no field is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)


class LookOptions(Body):
    """How pictures are looked at, as `Grounder.look` has it."""

    max_pixels: Pixels | None = None
    keep: Share | None = None
    pruning: Literal["diverse", "merge", "random"] = Field("diverse", description="how these are chosen")
    timeout: Seconds | None = None

    def look(self) -> dict[str, Any]:
        """The arguments of `Grounder.look`."""
        return {"max_pixels": self.max_pixels, "keep": self.keep, "pruning": self.pruning}


class AskOptions(Body):
    """What is asked, as `Scene.ground` has it."""

    queries: list[Query] = Field(min_length=1)
    think: bool = Field(False, description="let the model reason before it answers")
    constrained: bool = Field(True, description="decode only what an answer's grammar allows")
    max_new_tokens: Annotated[Whole, Field(ge=1, description="cut an answer after so many tokens")] | None = None
    timeout: Seconds | None = None

    def ask(self) -> dict[str, Any]:
        """The arguments of `Scene.ground`."""
        return {
            "queries": self.queries,
            "think": self.think,
            "constrained": self.constrained,
            "max_new_tokens": self.max_new_tokens,
        }


class GroundOptions(AskOptions, LookOptions):
    """Both, for a question about new pictures."""


class LookBody(LookOptions):
    """Pictures to look at."""

    images: list[str] = Field(min_length=1, description="data URLs (data:image/png;base64,...) or plain base64")


class GroundBody(GroundOptions, LookBody):
    """Pictures, and what is asked about them."""


class PictureOut(BaseModel):
    """A picture as it was understood."""

    index: int = Field(ge=0)
    name: str
    width: int = Field(ge=1, description="pixels, once it is upright")
    height: int = Field(ge=1)


class BoxOut(BaseModel):
    """A box in pixels of the original picture."""

    image: int = Field(ge=0, description="which picture, from 0")
    x1: float
    y1: float
    x2: float
    y2: float
    label: str | None
    score: float | None = Field(ge=0, le=1)


class Answer(BaseModel):
    """An answer: what `Grounding.from_json` reads."""

    format: Literal["gemvg-edge-grounding"]
    version: Literal[1]
    query: str
    images: list[PictureOut]
    boxes: list[BoxOut]
    text: str = Field(description="what the model wrote")
    thinking: str
    problem: str | None = Field(description="why boxes may be missing")
    timings: dict[str, float]


class Grounded(BaseModel):
    """Answers in the order of the queries."""

    model: str
    answers: list[Answer]
    warning: str | None = Field(description="what about the pictures is unlike those of the model's training")
    queue_ms: float = Field(ge=0, description="how long the request waited for its turn")


class SceneOut(BaseModel):
    """Pictures that were looked at, to be asked under this id."""

    id: str
    model: str
    images: list[PictureOut]
    warning: str | None
    look_ms: float = Field(ge=0)
    bytes: int = Field(ge=0, description="memory that the scene holds")
    expires_s: float = Field(ge=0, description="seconds without a question until it is let go")


class ErrorDetail(BaseModel):
    """Why a request was not answered, in a sentence."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorOut(BaseModel):
    """An error."""

    error: ErrorDetail
