"""`POST /v1/ground`, and `/v1/scenes`: look at pictures once, ask about them often. Knows no worker from within."""

from __future__ import annotations

import json
from typing import Any

from anyio import to_thread
from fastapi import APIRouter
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from gemvg_edge.serve.bodies import (
    MOST_FIELDS,
    Count,
    Form,
    ModelT,
    check_kind,
    read,
    read_form,
    read_json,
    read_picture,
    refusal_of,
)
from gemvg_edge.serve.messages import Message
from gemvg_edge.serve.pool import Job
from gemvg_edge.serve.refusals import Refused
from gemvg_edge.serve.scenes import Kept, new_name
from gemvg_edge.serve.schemas import (
    AskOptions,
    ErrorOut,
    GroundBody,
    Grounded,
    GroundOptions,
    LookBody,
    LookOptions,
    SceneOut,
)
from gemvg_edge.serve.service import Service

JSON, FORM = "application/json", "multipart/form-data"
SCENE_LINK = {"parameters": {"scene": "$response.body#/id"}}
PICTURE = {"type": "string", "format": "binary"}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut, "description": text}
    for status, text in (
        (400, "the request or a picture is at fault"),
        (401, "the token is missing or wrong"),
        (403, "called by another site's page, or by a name that the service does not know"),
        (408, "the request took too long to come"),
        (413, "too many bytes"),
        (415, "the body is of another type, or packed"),
        (500, "a fault of the service"),
        (503, "too much at once, or the worker was lost; Retry-After says when to ask again"),
        (504, "no answer in time"),
    )
}
NO_SCENE: dict[int | str, dict[str, Any]] = {404: {"model": ErrorOut, "description": "no such scene, or no more"}}


def make_router(service: Service) -> APIRouter:
    """The routes of a service."""
    router = APIRouter(tags=["grounding"], responses=ERRORS)

    @router.post(
        "/v1/ground",
        operation_id="ground",
        response_model=Grounded,
        openapi_extra=body_of(GroundBody, GroundOptions),
        summary="Ask about pictures",
    )
    async def ground(request: Request) -> Response:
        """One or several queries about some pictures, in a form or as JSON."""
        with service.held.counted() as count:
            pictures, asked = await take(service, request, count, GroundBody, GroundOptions)
            assert isinstance(asked, GroundOptions)
            message = {"do": "ground", "look": asked.look(), "ask": asked.ask()}
            job = service.pool.submit(message, pictures, service.seconds(asked.timeout))
            del pictures  # the job has them, until a worker does
            return answers_response(service, await service.result(request, job), job, looked=True)

    @router.post(
        "/v1/scenes",
        operation_id="look",
        status_code=201,
        response_model=SceneOut,
        responses={201: {"links": {name: SCENE_LINK | {"operationId": name} for name in ("ask", "scene", "forget")}}},
        openapi_extra=body_of(LookBody, LookOptions),
        summary="Look at pictures, to ask about them later",
    )
    async def look(request: Request) -> Response:
        """Pictures that are looked at once and kept for a while."""
        with service.held.counted() as count:
            pictures, asked = await take(service, request, count, LookBody, LookOptions)
            name = new_name()
            job = service.pool.submit(
                {"do": "look", "scene": name, "look": asked.look()}, pictures, service.seconds(asked.timeout)
            )
            del pictures  # the job has them, until a worker does
            done = await service.result(request, job)
        about = {
            "id": name,
            "model": service.name,
            "images": [{"index": k, **picture} for k, picture in enumerate(done["images"])],
            "warning": done["warning"],
            "look_ms": done["look_ms"],
            "bytes": done["bytes"],
        }
        assert job.worker is not None
        service.scenes.keep(name, job.worker, about, done["bytes"])
        return json_response(scene_content(service, service.scenes.kept[name]), 201)

    @router.post(
        "/v1/scenes/{scene}/ground",
        operation_id="ask",
        response_model=Grounded,
        responses=NO_SCENE,
        openapi_extra=body_of(AskOptions),
        summary="Ask about pictures that were looked at",
    )
    async def ask(scene: str, request: Request) -> Response:
        """One or several queries about a scene."""
        with service.held.counted() as count:
            asked = await take_json(service, request, count, AskOptions)
            service.check_counts(1, len(asked.queries))
            with service.scenes.asked(scene) as kept:
                job = service.pool.submit(
                    {"do": "ask", "scene": scene, "ask": asked.ask()}, [], service.seconds(asked.timeout), kept.worker
                )
                return answers_response(service, await service.result(request, job), job, looked=False)

    @router.get(
        "/v1/scenes/{scene}",
        operation_id="scene",
        response_model=SceneOut,
        responses=NO_SCENE,
        summary="A scene that is kept",
    )
    async def about(scene: str) -> Response:
        """What its client was told; counts as a use of it."""
        return json_response(scene_content(service, service.scenes.find(scene)))

    @router.delete(
        "/v1/scenes/{scene}", operation_id="forget", status_code=204, responses=NO_SCENE, summary="Let a scene go"
    )
    async def drop(scene: str) -> Response:
        """Give its memory back."""
        service.scenes.find(scene)
        service.scenes.drop(scene)
        return Response(status_code=204)

    return router


async def take(
    service: Service, request: Request, count: Count, body: type[LookBody], form: type[LookOptions]
) -> tuple[list[bytes], LookOptions]:
    """The pictures of a request, and its other fields; a form and JSON say the same."""
    data = await read(request, count, service.settings)
    if check_kind(request, JSON, FORM) == JSON:
        asked = read_json(data, body)
        queries = len(asked.queries) if isinstance(asked, AskOptions) else 1
        service.check_counts(len(asked.images), queries)
        pictures = [read_picture(text, f"images[{k}]") for k, text in enumerate(asked.images)]
        asked.images = []  # the text is large
        return pictures, asked
    most = service.settings.max_images + service.settings.max_queries + MOST_FIELDS
    # In a thread, since what nearly is a boundary keeps the parser busy, and everybody else would wait.
    return _take_form(service, await to_thread.run_sync(read_form, request, data, most), form)


async def take_json(service: Service, request: Request, count: Count, model: type[ModelT]) -> ModelT:
    """The body of a request that is JSON alone."""
    data = await read(request, count, service.settings)
    check_kind(request, JSON)
    return read_json(data, model)


def _take_form(service: Service, fields: Form, form: type[LookOptions]) -> tuple[list[bytes], LookOptions]:
    pictures = [content for name, content in fields if name == "image"]
    texts: dict[str, Any] = {}
    queries: list[str] = []
    for name, content in fields:
        if name in ("image", "images"):
            texts |= {} if name == "image" else {name: ""}
            continue
        try:
            text = content.decode()
        except UnicodeDecodeError:
            raise Refused(400, f"{name[:100]}: it is not text in UTF-8", param=name[:100]) from None
        if name == "query":
            queries.append(text)
        elif name in texts:
            raise Refused(400, f"{name[:100]}: it is given twice; give it once", param=name[:100])
        else:
            texts[name] = text
    asks = issubclass(form, AskOptions)
    for plural in ("images", "queries"):
        if plural in texts:
            one = "image" if plural == "images" else "query"
            raise Refused(400, f"{plural}: a form's field is `{one}`, given once for each", param=plural)
    service.check_counts(len(pictures), len(queries) if asks else 1, ("image", "query"))
    if queries and not asks:
        raise Refused(400, "query: a scene is asked later, at its own address; leave it out", param="query")
    try:
        asked = form.model_validate(texts | ({"queries": queries} if asks else {}), strict=False)
    except ValidationError as error:
        raise refusal_of(error) from None
    return pictures, asked


def answers_response(service: Service, done: Message, job: Job, looked: bool) -> Response:
    """Answers, counted."""
    answers = done["answers"]
    service.metrics.answered(answers, job.queue_ms, looked)
    content = {"model": service.name, "answers": answers, "warning": done.get("warning"), "queue_ms": job.queue_ms}
    return json_response(content)


def scene_content(service: Service, kept: Kept) -> Message:
    """What a client is told of a scene."""
    return kept.about | {"expires_s": service.settings.scene_seconds}


def json_response(content: Message, status: int = 200) -> Response:
    """JSON that was checked where it was made: pydantic would read all of it once more."""
    return Response(json.dumps(content).encode(), status, media_type=JSON)


def body_of(body: type[BaseModel], form: type[BaseModel] | None = None) -> dict[str, Any]:
    """What the OpenAPI document says of a body that FastAPI does not read itself, since it has no bounds."""
    content: dict[str, Any] = {JSON: {"schema": schema_of(body)}}
    if form is not None:
        fields = schema_of(form)
        fields["properties"]["image"] = {
            "type": "array",
            "minItems": 1,
            "items": {"type": "string", "format": "binary"},
        }
        fields["required"] = ["image"]
        if "queries" in fields["properties"]:
            fields["properties"]["query"] = fields["properties"].pop("queries")
            fields["required"].append("query")
        content[FORM] = {"schema": fields}
    return {"requestBody": {"required": True, "content": content}}


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """A body's JSON schema with nothing that it refers to outside."""
    return inlined(model.model_json_schema())


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its definitions put where they are used: OpenAPI looks for them elsewhere."""
    defined = schema.pop("$defs", {})

    def put(value: Any) -> Any:
        if isinstance(value, list):
            return [put(one) for one in value]
        if not isinstance(value, dict):
            return value
        if name := value.get("$ref", "").rpartition("/")[2]:
            return put(defined[name])
        return {key: put(one) for key, one in value.items() if key != "discriminator"}  # it names the definitions

    done: dict[str, Any] = put(schema)
    return done
