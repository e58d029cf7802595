"""`POST /v1/chat/completions` and `/v1/models` as OpenAI has them, so that any client of theirs can ask for boxes.

Pictures are those of all of the user's messages, the question is the text of the last one: each is answered by itself,
whatever was said before. The answer is the model's own text, or with `response_format` of type json_object the JSON of
`/v1/ground`; `message.grounding` has that in any case. Decoding is greedy, so what steers sampling changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from gemvg_edge.serve.bodies import read_picture
from gemvg_edge.serve.chat_schemas import ChatBody, Completion, ImagePart, ModelOut, Models, Said, TextPart, Turn
from gemvg_edge.serve.messages import Message
from gemvg_edge.serve.pool import Job
from gemvg_edge.serve.refusals import Gone, Refused, error_content
from gemvg_edge.serve.routes import ERRORS, body_of, json_response, take_json
from gemvg_edge.serve.schemas import ErrorOut
from gemvg_edge.serve.service import Service, until_gone

LIMITS = ("max_images", "max_queries", "max_bytes", "max_image_pixels", "max_query_tokens", "max_new_tokens", "timeout")
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string", "description": "with `stream`: its pieces"}}}}
}
NO_MODEL: dict[int | str, dict[str, Any]] = {404: {"model": ErrorOut, "description": "another model is served"}}


def make_router(service: Service) -> APIRouter:
    """The routes of a service."""
    router = APIRouter(tags=["as OpenAI has it"], responses=ERRORS)

    @router.get("/v1/models", response_model=Models)
    async def models() -> Response:
        """The model that is served."""
        return json_response({"object": "list", "data": [model_content(service)]})

    @router.get("/v1/models/{model}", response_model=ModelOut, responses=NO_MODEL)
    async def model(model: str) -> Response:
        """The model that is served."""
        check_model(service, model)
        return json_response(model_content(service))

    @router.post(
        "/v1/chat/completions",
        response_model=Completion,
        responses=NO_MODEL | STREAM,
        openapi_extra=body_of(ChatBody),
    )
    async def chat(request: Request) -> Response:
        """A question about the pictures of a chat."""
        with service.held.counted() as count:
            asked = await take_json(service, request, count, ChatBody)
            check_model(service, asked.model)
            pictures, query = pictures_and_query(asked.messages)
            asked.messages = []  # the text is large
            service.check_counts(len(pictures), 1, ("image_url parts", "text"))
            most = min(asked.max_completion_tokens or asked.max_tokens or 2**31, service.settings.max_new_tokens)
            message = {
                "do": "ground",
                "look": asked.look(),
                "ask": {
                    "queries": [query],
                    "think": asked.think,
                    "constrained": asked.constrained,
                    "max_new_tokens": most,
                },
                "stream": bool(asked.stream),
            }
            job = service.pool.submit(message, pictures, service.seconds(asked.timeout))
            del pictures  # the job has them, until a worker does
            as_json = asked.response_format is not None and asked.response_format.type == "json_object"
            head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
            if not asked.stream:
                done = await service.result(request, job)
                service.metrics.answered(done["answers"], job.queue_ms, looked=True)
                return json_response(completion(head, done, as_json))
            gone = asyncio.ensure_future(until_gone(request))
            try:
                first = await next_piece(job, gone)
                if first is None:
                    job.result.result()  # an error before the first text is a plain one
            except BaseException:
                leave(service, job, gone)
                raise
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = stream(service, job, gone, head, first, as_json, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    return router


def check_model(service: Service, name: str) -> None:
    """Refused for another model."""
    if name != service.name:
        raise Refused(404, f"the model {name[:100]!r} is not served here; ask {service.name!r}", param="model")


def model_content(service: Service) -> Message:
    """The model as a client is told of it."""
    about = {key: value for key, value in service.about.items() if key not in ("name", "pid")}
    limits = {name: getattr(service.settings, name) for name in LIMITS}
    return {"id": service.name, "object": "model", "created": 0, "owned_by": "gemvg-edge", **about, "limits": limits}


def pictures_and_query(messages: list[Turn]) -> tuple[list[bytes], str]:
    """All pictures of a chat, and the last question."""
    pictures: list[bytes] = []
    for k, turn in enumerate(messages):
        if isinstance(turn, Said):
            if turn.role != "assistant":
                why = f"messages.{k}.role is {turn.role!r}: the model knows one prompt, and no tools; leave it out"
                raise Refused(400, why, param=f"messages.{k}.role")
            continue
        for n, part in enumerate(turn.content if isinstance(turn.content, list) else ()):
            if isinstance(part, ImagePart):
                pictures.append(read_picture(part.image_url.url, f"messages.{k}.content.{n}.image_url.url"))
    if isinstance(last := messages[-1], Said):
        raise Refused(400, "messages: the last one must be the user's, with the question", param="messages")
    content = last.content
    texts = [content] if isinstance(content, str) else [part.text for part in content if isinstance(part, TextPart)]
    return pictures, "\n".join(texts)


def completion(head: Message, done: Message, as_json: bool) -> Message:
    """A whole answer."""
    (answer,) = done["answers"]
    message = {"role": "assistant", "content": content_of(answer, as_json), "grounding": answer}
    choice = {"index": 0, "message": message, "finish_reason": reason_of(done), "logprobs": None}
    return head | {"object": "chat.completion", "choices": [choice], "usage": usage_of(answer)}


def content_of(answer: Message, as_json: bool) -> str:
    """The text of an answer."""
    text: str = json.dumps(answer) if as_json else answer["text"]
    return text


def reason_of(done: Message) -> str:
    """Why an answer ends."""
    return "length" if done["cut"][0] else "stop"


def usage_of(answer: Message) -> Message:
    """Tokens of an answer, as OpenAI counts them."""
    t = answer["timings"]
    prompt, written = t["image_tokens"] + t["query_tokens"], t["answer_tokens"]
    counts = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    return counts | {"prompt_tokens_details": {"cached_tokens": t["cached_tokens"]}}


async def next_piece(job: Job, gone: asyncio.Future[None]) -> str | None:
    """The next text of an answer; None where all of it is there, Gone where its client is not."""
    piece = asyncio.ensure_future(job.pieces.get())
    both: set[asyncio.Future[Any]] = {piece, gone}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if not piece.done():
        piece.cancel()
        raise Gone
    return piece.result()


def leave(service: Service, job: Job, gone: asyncio.Future[None]) -> None:
    """Nothing more is sent."""
    gone.cancel()
    service.pool.leave(job)


async def stream(
    service: Service, job: Job, gone: asyncio.Future[None], head: Message, piece: str | None, as_json: bool, usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events: pieces of text as they are written, the boxes at the end, then [DONE]."""
    head = head | {"object": "chat.completion.chunk"}

    def event(delta: Message, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return sent(head | {"choices": [choice]} | ({"usage": None} if usage else {}))

    try:
        yield event({"role": "assistant", "content": ""})
        while piece is not None:
            if not as_json:
                yield event({"content": piece})
            piece = await next_piece(job, gone)
        done = job.result.result()
        service.metrics.answered(done["answers"], job.queue_ms, looked=True)
        (answer,) = done["answers"]
        delta = {"content": content_of(answer, as_json)} if as_json else {}
        yield event(delta | {"grounding": answer}, reason_of(done))
        if usage:
            yield sent(head | {"choices": [], "usage": usage_of(answer)})
        yield b"data: [DONE]\n\n"
    except Refused as refused:
        yield sent(error_content(refused.status, refused.sentence))
    except Gone:
        pass
    finally:
        leave(service, job, gone)


def sent(content: Message) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"
