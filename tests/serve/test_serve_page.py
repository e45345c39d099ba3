"""The page in a real browser: Debian's chromium (or another that is installed), driven by Playwright."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from stand_in import STEPS, FakeTrained, png, serving

from innerloop.serve import Limits

Stroke = Sequence[tuple[float, float]]
CROSS: list[Stroke] = [[(0.15, 0.15), (0.85, 0.85)], [(0.85, 0.15), (0.15, 0.85)]]
SMALL: list[Stroke] = [[(0.05 + x / 5, 0.05 + y / 5) for x, y in stroke] for stroke in CROSS]
BOX: list[Stroke] = [[(0.15, 0.15), (0.85, 0.15), (0.85, 0.85), (0.15, 0.85), (0.15, 0.15)]]

DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 740},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
}

expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    named = [os.environ.get("INNERLOOP_CHROMIUM", "chromium"), "chromium-browser", "google-chrome"]
    executable = next(filter(None, map(shutil.which, named)), None)
    if executable is None:
        pytest.skip("no chromium is installed (apt-get install chromium, or name one in INNERLOOP_CHROMIUM)")
    # Without a sandbox, since tests run as root in containers; the only pages it loads are this package's.
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet = ["--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=arguments + quiet)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(FakeTrained(), Limits()) as client:
        yield str(client.base_url)


class Visitor:
    """A person with a browser of their own, by mouse or by touch. At the end nothing may have gone wrong unseen."""

    def __init__(self, browser: Browser, address: str, **settings: Any) -> None:
        self.address = address
        self.context: BrowserContext = browser.new_context(**{"reduced_motion": "reduce", **settings})
        self.page: Page = self.context.new_page()
        self.touches = bool(settings.get("has_touch"))
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        expect(self.page.locator(".class")).to_have_count(2)

    def draw(self, pad: Locator, strokes: Sequence[Stroke]) -> None:
        pad.scroll_into_view_if_needed()
        box = pad.bounding_box()
        assert box is not None
        for stroke in strokes:
            points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
            (self._touch if self.touches else self._drag)(points)

    def _drag(self, points: list[tuple[float, float]]) -> None:
        mouse = self.page.mouse
        mouse.move(*points[0])
        mouse.down()
        for point in points[1:]:
            mouse.move(*point, steps=4)
        mouse.up()

    def _touch(self, points: list[tuple[float, float]]) -> None:
        session = self.context.new_cdp_session(self.page)
        for kind, at in [("touchStart", points[0]), *[("touchMove", p) for p in points[1:]], ("touchEnd", None)]:
            touched = [] if at is None else [{"x": at[0], "y": at[1]}]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touched})
        session.detach()

    def one(self, number: int) -> Locator:
        """The card of a class, counted from 1."""
        return self.page.locator(".class").nth(number - 1)

    def give(self, number: int, strokes: Sequence[Stroke], name: str | None = None) -> None:
        card = self.one(number)
        if name is not None:
            card.get_by_role("textbox").fill(name)
        before = card.get_by_role("img").count()
        self.draw(card.locator("canvas"), strokes)
        card.get_by_role("button", name="Add drawing").click()
        expect(card.get_by_role("img")).to_have_count(before + 1)

    def adapt(self) -> None:
        self.page.locator("#adapt-button").click()
        expect(self.page.locator("#query-pad")).to_be_visible()

    def ask(self, strokes: Sequence[Stroke]) -> None:
        self.page.locator("#query-clear").click() if self.page.locator("#query-clear").is_enabled() else None
        self.draw(self.page.locator("#query-pad"), strokes)

    @property
    def answer(self) -> Locator:
        return self.page.locator("#answer")

    @property
    def problem(self) -> Locator:
        return self.page.get_by_role("alert")

    def leave(self) -> None:
        self.context.close()
        assert self.errors == []
        assert [url for url in self.asked if not url.startswith((self.address, "data:", "blob:"))] == []


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def visitor(request: pytest.FixtureRequest, browser: Browser, address: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, address, **request.param)
    yield visitor
    visitor.leave()


@pytest.fixture
def at_desk(browser: Browser, address: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, address, **DESKTOP)
    yield visitor
    visitor.leave()


def test_draw_adapt_ask_and_watch(visitor: Visitor) -> None:
    page = visitor.page
    guide = page.locator("#guide")
    expect(guide).to_contain_text("Step 1")
    visitor.give(1, CROSS, "cross")
    visitor.give(2, BOX, "box")
    expect(guide).to_contain_text("Step 2")
    visitor.adapt()
    expect(guide).to_contain_text("Step 3")
    expect(page.locator("#loss-chart circle")).to_have_count(STEPS + 1)
    expect(page.locator("#loss-chart")).to_have_attribute("aria-label", re.compile("1.00, 0.50, 0.33, 0.25"))

    with page.expect_request("**/api/predict/*") as asked:
        visitor.ask(SMALL[:1])
    url = json.loads(asked.value.post_data or "")["images"][0]
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("L"))
    assert sent[0, 0] == 255  # white paper
    assert sent.min() < 40  # dark ink
    assert sent.mean() > 200
    # Drawn small in a corner, and sent centred and large.
    for axis in (0, 1):
        (inked,) = (sent < 128).any(axis).nonzero()
        assert inked[0] + inked[-1] == pytest.approx(223, abs=4)
        assert inked[-1] - inked[0] == pytest.approx(0.75 * 224, abs=6)

    expect(visitor.answer).to_contain_text("The network says cross")
    expect(guide).to_contain_text("slider")
    visitor.ask(BOX)
    expect(visitor.answer).to_contain_text("The network says box")
    expect(page.locator("#course-chart circle")).to_have_count(2 * (STEPS + 1))
    shares = page.locator("#bars .share")
    expect(shares).to_have_text([re.compile(r"^(<1|\d)%$"), re.compile(r"^(>99|9\d)%$")])

    slider = page.get_by_role("slider")
    assert slider.input_value() == str(STEPS)
    slider.fill("0")
    expect(page.locator("#step-name")).to_have_text(f"0 of {STEPS}")
    expect(shares).to_have_text(["50%", "50%"])
    expect(visitor.answer).to_contain_text("After no step")
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0  # nothing sticks out to the side


def test_two_browsers_at_once_do_not_mix(browser: Browser, address: str) -> None:
    left, right = Visitor(browser, address, **DESKTOP), Visitor(browser, address, **PHONE)
    left.give(1, CROSS, "left's cross")
    right.give(1, BOX, "right's box")
    left.give(2, BOX, "left's box")
    right.give(2, CROSS, "right's cross")
    left.adapt()
    right.adapt()
    for visitor, strokes, said in (
        (left, CROSS, "left's cross"),
        (right, CROSS, "right's cross"),
        (left, BOX, "left's box"),
        (right, BOX, "right's box"),
    ):
        visitor.ask(strokes)
        expect(visitor.answer).to_contain_text(f"says {said}")
    left.leave()
    right.leave()


def test_a_demonstration_without_drawing(browser: Browser, address: str) -> None:
    visitor = Visitor(browser, address, **DESKTOP, reduced_motion="no-preference")
    visitor.page.get_by_role("button", name="Show me an example").click()
    expect(visitor.answer).to_contain_text(re.compile("The network says (spiral|ladder|bolt)"))
    expect(visitor.page.locator(".thumbnails img")).to_have_count(6)
    visitor.page.get_by_role("button", name="Start over").click()
    expect(visitor.page.locator(".thumbnails img")).to_have_count(0)
    expect(visitor.page.locator("#asking")).to_be_hidden()
    visitor.leave()


def test_image_files_and_bad_ones(visitor: Visitor, tmp_path: Path) -> None:
    bad, dark, light = tmp_path / "notes.png", tmp_path / "dark.png", tmp_path / "light.jpg"
    bad.write_text("just some notes")
    dark.write_bytes(png(30, (300, 200)))
    light.write_bytes(png(220, kind="JPEG"))
    visitor.one(1).locator("input[type=file]").set_input_files(bad)
    expect(visitor.problem).to_contain_text("“notes.png” is not an image")
    visitor.page.get_by_role("button", name="Close").click()
    expect(visitor.problem).to_be_hidden()
    visitor.one(1).locator("input[type=file]").set_input_files([dark, dark])
    visitor.one(2).locator("input[type=file]").set_input_files(light)
    expect(visitor.page.locator(".thumbnails img")).to_have_count(3)
    visitor.adapt()
    visitor.page.locator("#query-file").set_input_files(light)
    expect(visitor.answer).to_contain_text("says B")
    visitor.page.locator("#query-file").set_input_files(bad)
    expect(visitor.problem).to_contain_text("“notes.png” is not an image")


def test_files_dropped_on_a_class(at_desk: Visitor) -> None:
    drop = """(card, image) => {
        const bytes = Uint8Array.from(atob(image), (c) => c.charCodeAt(0));
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
        card.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
    }"""
    at_desk.one(2).evaluate(drop, base64.b64encode(png(9)).decode())
    expect(at_desk.one(2).get_by_role("img")).to_have_count(1)
    expect(at_desk.one(1).get_by_role("img")).to_have_count(0)


def test_classes_and_examples_come_and_go(at_desk: Visitor) -> None:
    page, status = at_desk.page, at_desk.page.locator("#adapt-status")
    expect(at_desk.one(1).get_by_role("button", name="Remove")).to_be_disabled()  # two are the fewest
    page.get_by_role("button", name="Add a class").click()
    expect(page.get_by_label("Name of class 3")).to_be_focused()
    expect(page.get_by_label("Name of class 3")).to_have_value("C")
    expect(status).to_have_text("Still without an example: “A”, “B” and “C”.")
    at_desk.one(1).get_by_role("button", name="Remove").click()
    expect(page.locator(".class")).to_have_count(2)
    at_desk.give(1, CROSS)
    at_desk.give(1, CROSS)
    at_desk.one(1).get_by_role("button", name="Delete example 1 of B").click()
    expect(at_desk.one(1).get_by_role("img")).to_have_count(1)
    page.locator("#adapt-button").click()
    expect(at_desk.problem).to_have_text(re.compile("Still without an example: “C”"))
    at_desk.one(2).get_by_role("button", name="Add drawing").click()
    expect(at_desk.problem).to_contain_text("Draw something in the box of “C” first.")
    at_desk.draw(at_desk.one(2).locator("canvas"), BOX)
    at_desk.one(2).get_by_role("button", name="Undo").click()
    expect(at_desk.one(2).get_by_role("button", name="Undo")).to_be_disabled()
    at_desk.draw(at_desk.one(2).locator("canvas"), BOX)  # and not added: Adapt takes it
    at_desk.one(2).get_by_role("textbox").fill("b")
    expect(status).to_contain_text("Two classes are called")
    at_desk.one(2).get_by_role("textbox").fill("")
    expect(status).to_have_text("Give every class a name.")
    at_desk.one(2).get_by_role("textbox").fill("<b>box</b>")
    at_desk.adapt()
    expect(at_desk.one(2).get_by_role("img")).to_have_count(1)
    at_desk.ask(BOX)
    expect(at_desk.answer).to_contain_text("says <b>box</b>")
    page.get_by_role("button", name="Add a class").click()
    at_desk.give(3, CROSS[:1])
    expect(page.locator("#guide")).to_contain_text("the examples have changed")
    at_desk.adapt()
    expect(page.locator("#bars .label")).to_have_count(3)


def test_a_forgotten_classifier_and_a_server_that_is_gone(at_desk: Visitor) -> None:
    page = at_desk.page
    at_desk.give(1, CROSS)
    at_desk.give(2, BOX)
    with page.expect_response("**/api/adapt") as adapted:
        at_desk.adapt()
    page.request.delete(f"{at_desk.address}/api/classifiers/{adapted.value.json()['id']}")
    at_desk.ask(CROSS)
    expect(at_desk.problem).to_contain_text("Adapt again.")
    expect(page.locator("#asking")).to_be_hidden()
    at_desk.adapt()
    expect(at_desk.answer).to_contain_text("says A")
    page.route("**/api/predict/*", lambda route: route.abort())
    at_desk.ask(BOX)
    expect(at_desk.problem).to_contain_text("The server does not answer.")
    page.unroute("**/api/predict/*")
    page.route("**/api/predict/*", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    at_desk.ask(BOX)
    expect(at_desk.problem).to_contain_text("(status 502) makes no sense")


def test_by_keyboard(at_desk: Visitor) -> None:
    page = at_desk.page
    page.locator("#demo").focus()
    page.keyboard.press("Enter")
    expect(at_desk.answer).to_contain_text("says")
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#step-name")).to_have_text(f"{STEPS - 1} of {STEPS}")
    # Everything that can be worked has a name that a screen reader can say.
    for control in page.locator("button:visible, input:visible, canvas:visible, svg:visible").all():
        name = control.evaluate(
            "e => e.getAttribute('aria-label') || e.textContent || (e.labels && e.labels[0]?.textContent)"
        )
        assert name
        assert name.strip()
