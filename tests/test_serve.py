"""`gemvg serve` as a client sees it: answers are Python's own, scenes are kept and let go, OpenAI's client works."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from bench.readme import ROOT
from bench.service.running import Running, serving
from gemvg_edge import Grounder, Grounding
from gemvg_edge.serve.refusals import Refused
from gemvg_edge.serve.scenes import Scenes
from gemvg_edge.serve.settings import Settings

IMAGES = ROOT / "examples" / "images"
PAIR = [(IMAGES / name).read_bytes() for name in ("scene1-a.png", "scene1-b.png")]
QUERIES = ["all balls", "what both images show", "the red mug"]
SCHEMA = json.loads((ROOT / "docs" / "reference" / "grounding.schema.json").read_text())


def url_of(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def form(pictures: list[bytes], queries: list[str]) -> list[tuple[str, Any]]:
    """A form as httpx sends it."""
    return [("image", ("a.png", picture)) for picture in pictures] + [("query", (None, query)) for query in queries]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def grounder() -> Iterator[Grounder]:
    with Grounder.open() as grounder:
        yield grounder


def same(answer: dict[str, Any], expected: Grounding) -> bool:
    """Whether an answer is Python's; read back, as a client would."""
    jsonschema.validate(answer, SCHEMA)
    got = Grounding.from_json(json.dumps(answer))
    return (got.boxes, got.text, got.query) == (expected.boxes, expected.text, expected.query)


# Ground


def test_a_form_is_answered_as_python_answers(client: httpx.Client, grounder: Grounder) -> None:
    answer = client.post("/v1/ground", files=form(PAIR, QUERIES))
    assert answer.status_code == 200
    content = answer.json()
    expected = grounder.look(PAIR).ground(QUERIES)
    assert len(expected[0]) >= 4
    assert all(same(a, e) for a, e in zip(content["answers"], expected, strict=True))
    assert (content["model"], content["warning"]) == ("tabletop", None)
    assert all(box["score"] is not None for box in content["answers"][0]["boxes"])
    assert content["answers"][0]["timings"]["image_tokens"] > 100


def test_json_is_answered_as_a_form_is(client: httpx.Client, grounder: Grounder) -> None:
    images = [url_of(PAIR[0]), base64.b64encode(PAIR[1]).decode()]
    answer = client.post("/v1/ground", json={"images": images, "queries": QUERIES})
    expected = grounder.look(PAIR).ground(QUERIES)
    assert all(same(a, e) for a, e in zip(answer.json()["answers"], expected, strict=True))


def test_options_are_pythons(client: httpx.Client, grounder: Grounder) -> None:
    options = {"max_pixels": 9216, "keep": 0.7, "pruning": "merge", "max_new_tokens": 5}
    expected = grounder.look(PAIR, max_pixels=9216, keep=0.7, pruning="merge").ground("all balls", max_new_tokens=5)
    body = {"images": [url_of(p) for p in PAIR], "queries": ["all balls"], **options}
    of_json = client.post("/v1/ground", json=body).json()["answers"][0]
    fields = [(name, (None, str(value))) for name, value in options.items()]
    of_form = client.post("/v1/ground", files=form(PAIR, ["all balls"]) + fields).json()["answers"][0]
    assert same(of_json, expected)
    assert same(of_form, expected)
    assert expected.problem == "the answer was cut at max_new_tokens=5" == of_form["problem"]


def test_pictures_unlike_the_training_are_told(client: httpx.Client) -> None:
    answer = client.post("/v1/ground", files=form([*PAIR, *PAIR, PAIR[0]], ["all balls"])).json()
    assert answer["warning"].startswith("5 pictures were given, and the model was trained on at most 4 at once")


# Scenes


def test_a_scene_is_looked_at_once_and_asked_often(client: httpx.Client, grounder: Grounder) -> None:
    scene = client.post("/v1/scenes", files=form(PAIR, []))
    assert scene.status_code == 201
    about = scene.json()
    assert [image["width"] for image in about["images"]] == [320, 320]
    assert about["bytes"] == grounder.look(PAIR).bytes
    for query in QUERIES:
        answer = client.post(f"/v1/scenes/{about['id']}/ground", json={"queries": [query]}).json()
        assert same(answer["answers"][0], grounder.ground(PAIR, query))
    kept = client.get(f"/v1/scenes/{about['id']}").json()
    assert {**kept, "expires_s": 0} == {**about, "expires_s": 0}
    assert client.delete(f"/v1/scenes/{about['id']}").status_code == 204
    gone = client.post(f"/v1/scenes/{about['id']}/ground", json={"queries": QUERIES})
    assert (gone.status_code, gone.json()["error"]["type"]) == (404, "not_found_error")
    assert "look at its pictures again" in gone.json()["error"]["message"]


def test_scenes_make_room_and_expire() -> None:
    flags = ("--max-scenes", "2", "--scene-seconds", "1.5")
    with serving(*flags) as running, httpx.Client(base_url=running.url) as client:
        ids = [client.post("/v1/scenes", files=form(PAIR, [])).json()["id"] for _ in range(2)]
        assert client.get(f"/v1/scenes/{ids[0]}").status_code == 200  # used last now
        third = client.post("/v1/scenes", files=form(PAIR, [])).json()["id"]
        found = [client.get(f"/v1/scenes/{name}").status_code for name in (*ids, third)]
        assert found == [200, 404, 200]
        end = time.monotonic() + 20
        while running.metrics()["gemvg_scenes"] and time.monotonic() < end:
            time.sleep(0.2)
        assert running.metrics()["gemvg_scene_bytes"] == 0


def test_scenes_that_are_asked_stay_until_they_are_not() -> None:
    class Silent:
        def say(self, message: dict[str, Any]) -> None:
            dropped.append(message["scene"])

    dropped: list[str] = []
    worker: Any = Silent()
    scenes = Scenes(Settings(max_scenes=1))
    scenes.keep("a", worker, {}, 1)
    with scenes.asked("a"):
        with pytest.raises(Refused, match="all scenes that are kept are being asked"):
            scenes.keep("b", worker, {}, 1)
        assert list(scenes.kept) == ["a"]
    scenes.keep("c", worker, {}, 1)
    assert (list(scenes.kept), dropped) == (["c"], ["b", "a"])


def test_a_scene_that_is_too_large_is_not_kept() -> None:
    with serving("--max-scene-bytes", "1000000") as running, httpx.Client(base_url=running.url) as client:
        answer = client.post("/v1/scenes", files=form(PAIR, []))
        assert answer.status_code == 413
        assert "more than 1000000" in answer.json()["error"]["message"]
        assert running.metrics()["gemvg_scenes"] == 0


# As OpenAI has it


@pytest.fixture(scope="module")
def chat(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def question(query: str, pictures: list[bytes]) -> list[Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url_of(p)}} for p in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": query}]}]


def test_openais_client_gets_an_answer(chat: openai.OpenAI, grounder: Grounder) -> None:
    expected = grounder.ground(PAIR, "all balls")
    done = chat.chat.completions.create(model="tabletop", messages=question("all balls", PAIR), temperature=0)
    (choice,) = done.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, "stop")
    assert same(choice.message.model_extra["grounding"], expected)  # type: ignore[index]
    timings = expected.timings
    assert done.usage is not None
    assert done.usage.prompt_tokens == timings.image_tokens + timings.query_tokens
    assert done.usage.total_tokens - done.usage.prompt_tokens == timings.answer_tokens


def test_openais_client_gets_boxes_as_json_and_a_cut_answer(chat: openai.OpenAI, grounder: Grounder) -> None:
    messages = question("all balls", PAIR)
    done = chat.chat.completions.create(model="tabletop", messages=messages, response_format={"type": "json_object"})
    assert same(json.loads(done.choices[0].message.content or ""), grounder.ground(PAIR, "all balls"))
    cut = chat.chat.completions.create(model="tabletop", messages=messages, max_tokens=5)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage is not None
    assert cut.usage.completion_tokens == 5


def test_openais_client_gets_a_stream(chat: openai.OpenAI, grounder: Grounder) -> None:
    stream = chat.chat.completions.create(
        model="tabletop", messages=question("all balls", PAIR), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    expected = grounder.ground(PAIR, "all balls")
    assert "".join(pieces) == expected.text
    assert len([piece for piece in pieces if piece]) > 10
    last, usage = chunks[-2:]
    assert last.choices[0].finish_reason == "stop"
    assert same(last.choices[0].delta.model_extra["grounding"], expected)  # type: ignore[index]
    assert usage.usage is not None
    assert usage.usage.completion_tokens == expected.timings.answer_tokens


def test_a_chat_goes_on_about_the_same_pictures(chat: openai.OpenAI, grounder: Grounder) -> None:
    messages = question("all balls", PAIR)
    messages.append(chat.chat.completions.create(model="tabletop", messages=messages).choices[0].message)
    messages += [{"role": "assistant", "content": "None"}, {"role": "user", "content": "what both images show"}]
    done = chat.chat.completions.create(model="tabletop", messages=messages)
    assert done.choices[0].message.content == grounder.ground(PAIR, "what both images show").text


def test_openais_client_is_told_what_is_wrong(chat: openai.OpenAI) -> None:
    assert [model.id for model in chat.models.list()] == ["tabletop"] == [chat.models.retrieve("tabletop").id]
    ask = chat.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="'gpt-5' is not served here; ask 'tabletop'"):
        ask(model="gpt-5", messages=question("all balls", PAIR))
    with pytest.raises(openai.BadRequestError, match="image_url parts: the request has 0; send 1 to 8"):
        ask(model="tabletop", messages=question("all balls", []))
    with pytest.raises(openai.BadRequestError, match=r"messages\.0\.role is 'system': the model knows one prompt"):
        ask(model="tabletop", messages=[{"role": "system", "content": "be nice"}, *question("all balls", PAIR)])
    with pytest.raises(openai.BadRequestError, match="modelx: there is no such field here; see /openapi"):
        ask(model="tabletop", messages=question("x", PAIR), extra_body={"modelx": 1})
    with pytest.raises(openai.BadRequestError, match="stop: List should have at most 0 items"):
        ask(model="tabletop", messages=question("x", PAIR), stop=["x"])
    off: dict[str, Any] = {
        "tools": [],
        "stop": None,
        "logprobs": False,
        "logit_bias": {},
        "seed": 1,
        "reasoning_effort": "low",
    }
    done = ask(model="tabletop", messages=question("all balls", PAIR), extra_body={"keep": 0.9, "timeout": 9.0}, **off)
    assert done.choices[0].finish_reason == "stop"
    for stream in (False, True):  # an error before the first text is a plain one
        with pytest.raises(openai.BadRequestError, match="is not a picture that Pillow can read"):
            ask(model="tabletop", messages=question("x", [b"no picture"]), stream=stream)


# Who may ask, and what is told


def test_the_token_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("open-sesame\n")
    with serving("--token-file", str(tmp_path / "token")) as running, httpx.Client(base_url=running.url) as client:
        for path in ("/v1/models", "/metrics", "/v1/scenes/x"):
            for shown in ({}, {"Authorization": "Bearer open-sesam"}, {"Authorization": "Basic open-sesame"}):
                refused = client.get(path, headers=shown)
                assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert client.get("/v1/models", headers={"Authorization": "bearer open-sesame"}).status_code == 200
        assert [client.get(path).status_code for path in ("/", "/healthz", "/readyz")] == [200] * 3
        assert "open-sesame" not in Path(f"/proc/{running.process.pid}/cmdline").read_text()


def test_pages_of_other_sites_are_refused(client: httpx.Client, running: Running) -> None:
    def get(**headers: str) -> int:
        return client.get("/v1/models", headers=headers).status_code

    assert get(Host="evil.example") == 403  # a site that gives its own name this machine's address
    assert get(Host=f"localhost:{running.port}") == 200
    assert get(Origin="https://evil.example") == 403 == get(Origin="null")
    assert get(Origin=running.url) == 200
    with serving("--allow-host", "robot.example") as other, httpx.Client(base_url=other.url) as client:
        assert get(Host="robot.example", Origin="https://robot.example") == 200
        assert get(Host="evil.example", Origin="https://evil.example") == 403


def test_health_and_counters_are_told(client: httpx.Client, running: Running) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "model": "tabletop"}
    before = running.metrics()
    for _ in range(2):
        client.post("/v1/ground", files=form(PAIR, ["all balls"]))
    after = running.metrics()
    name = 'gemvg_requests_total{route="/v1/ground",status="200"}'
    assert after[name] == before.get(name, 0) + 2
    looked = after["gemvg_image_tokens_total"] - before["gemvg_image_tokens_total"]
    assert looked >= 2 * 150
    assert after["gemvg_cached_tokens_total"] > before["gemvg_cached_tokens_total"]
    assert after['gemvg_phase_seconds_count{phase="decode"}'] == before['gemvg_phase_seconds_count{phase="decode"}'] + 2
    assert min(running.memory().values()) > 1e7
    assert after["gemvg_queue_length"] == after["gemvg_running"] == 0


def test_the_openapi_document_has_every_route(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    expected = {"/v1/ground", "/v1/scenes", "/v1/scenes/{scene}", "/v1/scenes/{scene}/ground", "/v1/chat/completions"}
    assert expected | {"/v1/models", "/v1/models/{model}", "/healthz", "/readyz", "/metrics"} == set(document["paths"])
    assert "$defs" not in json.dumps(document)
