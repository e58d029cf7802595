"""The page of `gemvg serve` in headless Chromium, with the shipped model: by mouse, by keyboard, by a hostile name."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.service.running import Running, serving
from gemvg_edge import Grounder
from gemvg_edge.serve.app import PAGE
from tests.test_serve import IMAGES, PAIR
from tests.test_serve_workers import workers_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
MOVED = "the object that was moved"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving("--max-images", "4") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", *CAMERA])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, running: Running) -> Iterator[Any]:
    """The page, which neither fails nor asks anybody else."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write", "camera"])
    page, faults, asked = context.new_page(), [], []
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(running.url)
    page.wait_for_selector("#about:has-text('The small model that ships with gemvg-edge')")
    yield page
    context.close()
    assert not faults
    assert all(url.startswith((f"{running.url}/", "blob:", "data:")) for url in asked)


def pick(page: Any, *names: str) -> None:
    page.set_input_files("#files", [str(IMAGES / name) for name in names])
    page.wait_for_selector(f".stage img >> nth={len(names) - 1}")


def find(page: Any, query: str) -> None:
    page.fill("#query", query)
    page.click("#go")
    page.wait_for_selector(f"#asked:text-is('{query}')")


def test_boxes_stand_where_python_finds_them(page: Any) -> None:
    pick(page, "scene4-a.png", "scene4-b.png")
    find(page, MOVED)
    with Grounder.open() as grounder:
        expected = grounder.ground([IMAGES / "scene4-a.png", IMAGES / "scene4-b.png"], MOVED).boxes
    assert len(expected) == 2 == page.locator(".box").count() == page.locator("#boxes button").count()
    for n, box in enumerate(expected):
        stage = page.locator(".stage").nth(box.image)
        picture, shown = stage.locator("img").bounding_box(), stage.locator(".box").bounding_box()
        scale = picture["width"] / 320
        assert shown["x"] - picture["x"] == pytest.approx(box.x1 * scale, abs=1)
        assert shown["y"] - picture["y"] == pytest.approx(box.y1 * scale, abs=1)
        assert shown["width"] == pytest.approx((box.x2 - box.x1) * scale, abs=1)
        assert stage.locator(".box").inner_text() == f"{n + 1} · {box.score:.2f}"
    assert page.inner_text("#status").startswith("2 boxes in 2 pictures; ")
    page.click("summary")
    page.click("#copy")
    page.wait_for_selector("#copy:text-is('Copied')")
    copied = json.loads(page.evaluate("() => navigator.clipboard.readText()"))
    assert [box["x1"] for box in copied["boxes"]] == [box.x1 for box in expected]


def test_a_box_asks_for_the_same_object(page: Any, running: Running) -> None:
    looks = running.metrics()['gemvg_requests_total{route="/v1/scenes",status="201"}']
    pick(page, "scene4-a.png", "scene4-b.png")
    find(page, MOVED)
    page.locator(".box").first.click()
    page.wait_for_selector(f"#asked:text-is('the same object as box 1 in image 1 ({MOVED})')")
    with Grounder.open() as grounder:
        scene = grounder.look([IMAGES / "scene4-a.png", IMAGES / "scene4-b.png"])
        first = scene.ground(MOVED)[0]
        (expected,) = scene.ground(f"the same object as {scene.mark(first)} in image 1")
    assert page.locator("button.box").count() == 1 == page.locator("li:nth-child(2) button.box").count()
    assert page.locator("li:nth-child(1) .box.source").count() == 1  # what was asked from stays in sight
    assert f"{expected.score:.2f}" in page.inner_text("#boxes")
    after = running.metrics()['gemvg_requests_total{route="/v1/scenes",status="201"}']
    assert after == looks + 1  # looked once, asked twice
    page.click("#back")
    assert page.inner_text("#asked") == MOVED
    assert page.locator("button.box").count() == 2


def test_the_keyboard_is_enough(page: Any) -> None:
    def tab_to(selector: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.locator(f"{selector}:focus").count():
                return
        raise AssertionError(f"Tab does not come to {selector}")

    tab_to("#sample")
    page.keyboard.press("Enter")
    page.wait_for_selector("#query:focus")  # where one goes on to type
    page.keyboard.press("Enter")
    page.wait_for_selector("#asked:text-is('all balls')")
    assert page.locator(".box").count() == 4
    tab_to("#boxes button")
    page.wait_for_selector(".box.chosen")
    page.keyboard.press("Enter")
    page.wait_for_selector("#asked:has-text('the same object as box 1')")
    page.wait_for_selector("#asked:focus")  # not lost with the box that was chosen
    page.focus("figcaption button >> nth=0")
    page.keyboard.press("Enter")
    page.wait_for_selector("figcaption button:focus")


def test_boxes_of_other_pictures_are_never_shown(page: Any, running: Running) -> None:
    """Pictures that were changed while they were looked at: their scene is let go, the new ones get their own."""
    (worker,) = workers_of(running)
    page.set_input_files("#files", [str(IMAGES / "scene1-a.png")])
    page.fill("#query", "all balls")
    os.kill(worker, signal.SIGSTOP)
    try:
        page.click("#go")
        page.wait_for_selector("#status:text-is('Looking at the pictures…')")
        page.click("#clear")
        page.set_input_files("#files", [str(IMAGES / name) for name in ("scene4-a.png", "scene4-b.png")])
    finally:
        os.kill(worker, signal.SIGCONT)
    page.wait_for_selector("#go:not([aria-disabled])")
    find(page, MOVED)
    shown = json.loads(page.text_content("#json"))
    assert len(shown["images"]) == 2
    with Grounder.open() as grounder:
        expected = grounder.ground([IMAGES / "scene4-a.png", IMAGES / "scene4-b.png"], MOVED)
    assert [box["x1"] for box in shown["boxes"]] == [box.x1 for box in expected]


def test_a_scene_that_was_let_go_is_looked_at_again(page: Any, running: Running) -> None:
    page.click("#sample")
    page.wait_for_selector(".stage img")
    find(page, "all balls")
    for _ in range(40):  # other clients' scenes take its room
        httpx.post(f"{running.url}/v1/scenes", files=[("image", PAIR[0])])
    find(page, "what both images show")
    assert page.locator(".box").count() >= 1


def test_what_is_wrong_is_told(page: Any, tmp_path: Path) -> None:
    page.fill("#query", "x")
    page.click("#go")
    page.wait_for_selector("#status.bad:text-is('Pick some pictures first.')")
    evil = tmp_path / "<img src=x onerror=document.title='taken'>.png"
    evil.write_bytes(b"no picture")
    page.set_input_files("#files", [str(evil)])
    page.wait_for_selector("#status.bad:has-text('This browser cannot show')")
    page.click("#go")
    page.wait_for_selector("#status.bad:has-text('is not a picture that Pillow can read')")
    page.click("text=Remove")
    page.set_input_files("#files", [str(IMAGES / "scene1-a.png")] * 5)
    page.wait_for_selector("#status.bad:text-is('That is too many: at most 4 pictures at once.')")
    pick(page, "scene1-a.png")
    find(page, "<b>balls</b>")
    assert page.title() == "gemvg-edge"


def test_a_frame_of_the_camera_is_a_picture(page: Any) -> None:
    page.click("#camera")
    page.wait_for_selector("#viewfinder:visible")
    page.wait_for_timeout(500)
    page.click("#shoot")
    page.wait_for_selector(".stage img")
    page.click("#stop")
    find(page, "all balls")
    page.wait_for_selector("#status:has-text('is unlike the pictures of the training')")


def test_a_token_is_asked_for(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("open-sesame")
    with serving("--token-file", str(tmp_path / "token")) as running:
        page = browser.new_page()
        page.goto(running.url)
        page.fill("#token", "close-sesame")
        page.click("#access button")
        page.wait_for_selector("#status.bad:has-text('the token is missing or wrong')")
        page.fill("#token", "open-sesame")
        page.click("#access button")
        page.wait_for_selector("#about:has-text('The small model')")
        page.click("#sample")
        page.wait_for_selector(".stage img")
        find(page, "all balls")
        page.close()


def test_the_sample_is_the_shipped_scene() -> None:
    assert [(PAGE / name).read_bytes() for name in ("sample-a.png", "sample-b.png")] == PAIR
