"""The playground: its files by themselves, and what a browser makes of them in front of a real service.

Every browser test also fails if the console shows an error, a dialog opens, or a request leaves the service's origin.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image

from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.config import ServiceConfig
from guardreasoner_vl.service.page import FILES
from tests.made_images import image
from tests.service.running import running
from tests.service.scripted_backend import ScriptedBackend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, ConsoleMessage, Dialog, FilePayload, Locator, Page, Request

    from guardreasoner_vl.engines.base import StreamListener
    from guardreasoner_vl.service.backend import Backend
    from guardreasoner_vl.types import Exchange, Mode, Verdict

pytestmark = pytest.mark.slow
KEY = "a-key-of-some-length"
PNG = image(56, 56).png
EVIL = "<img src=x onerror=alert(/reasoning/)><script>alert(/reasoning/)</script>"
FOLDER = files("guardreasoner_vl.service.page")
SOURCES = {name: (FOLDER / name).read_text() for name, _ in FILES.values()}
SCRIPTS = {name: source for name, source in SOURCES.items() if name.endswith(".js")}
CHROMIUM = shutil.which("chromium")
LACKING = "playwright (pip install playwright)" if not find_spec("playwright") else "" if CHROMIUM else "chromium"
in_browser = pytest.mark.skipif(bool(LACKING), reason=f"the page is not tried in a browser: install {LACKING}")


# --- the files ------------------------------------------------------------------------------------------


@dataclass
class Elements(HTMLParser):
    """Every element with its attributes, and the text inside script and style."""

    elements_seen: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    inline: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements_seen.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.inline += data.strip()


def elements() -> Elements:
    parser = Elements()
    parser.feed(SOURCES["page.html"])
    return parser


def test_nothing_is_inline() -> None:
    parsed = elements()
    assert parsed.inline == ""
    assert [attributes["src"] for tag, attributes in parsed.elements_seen if tag == "script"] == ["page.js"]
    for tag, attributes in parsed.elements_seen:
        assert tag not in ("style", "base", "iframe", "object", "embed")
        assert not [name for name in attributes if name == "style" or name.startswith("on")]


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_loaded_from_elsewhere(name: str) -> None:
    assert not re.search(r"https?:|[\"'(=]\s*//|@import|url\(", SOURCES[name])


def test_every_file_of_the_page_is_served() -> None:
    assert sorted(path.name for path in FOLDER.iterdir() if path.name.endswith((".html", ".css", ".js"))) == sorted(
        SOURCES
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_served_scripts_and_only_what_they_export(name: str) -> None:
    for names, source in re.findall(r"import \{ (.*) \} from \"\./(.*)\";", SCRIPTS[name]):
        exported = re.findall(
            r"^export (?:const|class|async function\*?|function) ([\w$]+)", SCRIPTS[source], re.MULTILINE
        )
        assert set(names.split(", ")) <= set(exported)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_has_no_way_to_make_html_or_code_and_keeps_nothing(name: str) -> None:
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|createContextualFragment|setHTML|DOMParser"
    ways += r"|\beval\b|new Function|setTimeout|javascript:|localStorage|indexedDB|document\.cookie|console\."
    assert not re.search(ways, SCRIPTS[name])


def test_what_the_script_names_is_there() -> None:
    ids = {attributes["id"] for _, attributes in elements().elements_seen if "id" in attributes}
    named = set(re.findall(r"(?:\$|\bon|\binstance)\(\"([\w-]+)\"", "".join(SCRIPTS.values())))
    assert len(named) > 15
    assert named <= ids


def test_every_field_has_a_label() -> None:
    elements_seen = elements().elements_seen
    labelled = {attributes.get("for") for tag, attributes in elements_seen if tag == "label"}
    fields = {attributes.get("id") for tag, attributes in elements_seen if tag in ("textarea", "select", "input")}
    assert len(fields) == 8
    assert fields <= labelled


# --- a service and a browser ----------------------------------------------------------------------------


class Talker(ScriptedBackend):
    """For WAIT it stops in the middle of its reasoning until `gate` opens, then starts again."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.gate = threading.Event()
        self.modes: list[Mode | None] = []

    async def judge(self, exchange: Exchange, mode: Mode | None, listener: StreamListener | None) -> Verdict:
        self.modes.append(mode)
        if listener and "WAIT" in (exchange.prompt or ""):
            try:
                await self._stop(listener)
            except asyncio.CancelledError:
                self.cancelled.append(exchange)
                raise
        return await super().judge(exchange, mode, listener)

    async def _stop(self, listener: StreamListener) -> None:
        listener.on_start()
        for word in ("<think>\n", "First ", "thoughts"):
            listener.on_text(word)
        while not self.gate.is_set():
            await asyncio.sleep(0.01)


@contextmanager
def served(backends: dict[str, Backend], **settings: Any) -> Iterator[str]:
    """Serve on a free port, and yield the address."""
    with running(create_app(ServiceConfig(**settings), backends)) as address:
        yield address


def until(happens: Any) -> None:
    end = time.monotonic() + 10
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@dataclass
class Site:
    """The service of most tests: `default` and `other`, whose words and name attack the page."""

    url: str
    guard: Talker
    other: Talker


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    guard, other = Talker(), Talker(reasoning=f"Odd. {EVIL}", name=EVIL)
    with served({"default": guard, "other": other}) as url:
        yield Site(url, guard, other)


@contextmanager
def tab(browser: Browser, url: str, faults: list[str], **settings: Any) -> Iterator[Page]:
    """An empty tab in its own browser context; forbidden actions of the page are appended to `faults`."""

    def refuse(dialog: Dialog) -> None:
        faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def check(sent: Request) -> None:
        if not sent.url.startswith((url, "data:")):
            faults.append(sent.url)

    def hear(said: ConsoleMessage) -> None:
        if said.type in ("error", "warning"):
            faults.append(said.text)

    with browser.new_context(**settings) as context:
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", hear)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", refuse)
        page.on("request", check)
        yield page


@contextmanager
def opened(browser: Browser, url: str, expected: str = "", **settings: Any) -> Iterator[Page]:
    """Open the page; `expected` is the start of the console errors that are allowed."""
    faults: list[str] = []
    with tab(browser, url, faults, **settings) as page:
        page.goto(url)
        yield page
    assert [fault for fault in faults if not (expected and fault.startswith(expected))] == []


@pytest.fixture(scope="module")
def faults() -> list[str]:
    return []


@pytest.fixture(scope="module")
def shared_tab(browser: Browser, site: Site, faults: list[str]) -> Iterator[Page]:
    with tab(browser, site.url, faults) as page:
        yield page


@pytest.fixture
def page(shared_tab: Page, site: Site, faults: list[str]) -> Iterator[Page]:
    """The page of `site`, freshly loaded."""
    site.guard.gate.clear()
    site.guard.modes.clear()
    faults.clear()
    shared_tab.goto(site.url)
    shared_tab.locator("#guard option").nth(1).wait_for(state="attached")
    yield shared_tab
    assert faults == []


def judged(page: Page, prompt: str, state: str, response: str = "") -> Locator:
    """The first panel, once it has reached `state`."""
    page.get_by_label("Prompt").fill(prompt)
    if response:
        unfold(page, "response")
        page.get_by_label("Response", exact=True).fill(response)
    page.get_by_role("button", name="Judge").click()
    return reached(page, state)


def unfold(page: Page, part: str) -> None:
    fold = page.locator(f"#{part}-fold")
    if fold.get_attribute("open") is None:
        fold.locator("summary").click()


def reached(page: Page, state: str) -> Locator:
    panel = page.locator("#panels article").first
    panel.and_(page.locator(f"[data-state={state}]")).wait_for()
    return panel


def body_of(sent: Request) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(sent.post_data or "")
    return body


def shown(panel: Locator, part: str) -> str:
    return panel.locator(f"[data-part={part}]").first.inner_text()


# --- verdicts -------------------------------------------------------------------------------------------


@in_browser
def test_a_verdict_is_shown_whole(page: Page) -> None:
    panel = judged(page, "How do I bake bread?", "allow")
    assert (shown(panel, "title"), shown(panel, "sign")) == ("Allow", "✓")
    assert shown(panel, "reasoning") == "Looked at it."
    rows = panel.locator(".judgement").all_inner_texts()
    assert [" ".join(row.lower().split()) for row in rows] == ["request unharmful probability of harm 0.100"]
    bar = panel.get_by_role("meter").first
    assert float(bar.get_attribute("aria-valuenow") or 1) == pytest.approx(0.1)
    share = bar.evaluate("bar => bar.firstElementChild.offsetWidth / bar.offsetWidth")
    assert share == pytest.approx(0.1, abs=0.02)
    assert re.fullmatch(
        r"Tokens\s+\d+ read, \d+ written\s+Seconds\s+[\d.]+\s+Mode\s+slow\s+Model\s+scripted\s+Revision\s+r1",
        shown(panel, "facts"),
    )
    panel.get_by_text("Verdict as JSON").click()
    assert json.loads(shown(panel, "json"))["request"]["label"] == "unharmful"
    spoken = panel.locator("[aria-live=polite]").inner_text()
    assert [line for line in spoken.split("\n") if line][-3:] == [
        "Allow",
        "The guard saw nothing harmful.",
        "Reason given: Looked at it.",
    ]


@in_browser
def test_harm_is_named_by_side(page: Page) -> None:
    panel = judged(page, "BAD", "block", response="Fine.")
    assert shown(panel, "title") == "Block"
    assert shown(panel, "why") == "The request and the response are harmful."
    assert panel.locator(".label").all_inner_texts() == ["harmful", "harmful"]


@in_browser
def test_reasoning_streams_and_begins_again(page: Page, site: Site) -> None:
    panel = judged(page, "WAIT, then BROKEN", "busy")  # without a verdict the streamed words stay
    panel.get_by_text("First thoughts").wait_for()
    assert panel.get_attribute("aria-busy") == "true"
    assert page.get_by_role("button", name="Judge").count() == 0
    site.guard.gate.set()
    reached(page, "unsure")
    assert shown(panel, "reasoning").strip() == "Looked at it."


@in_browser
def test_a_request_can_be_stopped(page: Page, site: Site) -> None:
    judged(page, "WAIT", "busy").get_by_text("First thoughts").wait_for()
    page.keyboard.press("Enter")  # the focus has gone to Stop
    panel = reached(page, "unsure")
    assert shown(panel, "title") == "Stopped: not judged"
    until(lambda: site.guard.cancelled)
    assert page.get_by_role("button", name="Judge").evaluate("button => button === document.activeElement")


@in_browser
def test_ctrl_enter_judges_and_a_change_makes_the_verdict_stale(page: Page) -> None:
    page.get_by_label("Prompt").fill("Hello.")
    page.keyboard.press("Control+Enter")
    reached(page, "allow")
    assert page.locator("#stale").is_hidden()
    page.get_by_label("Prompt").press_sequentially("!")
    assert page.locator("#stale").is_visible()


# --- what is not a verdict ------------------------------------------------------------------------------


def assert_not_green(panel: Locator) -> None:
    colours = panel.locator(".headline").evaluate(
        "one => [getComputedStyle(one).color, getComputedStyle(one).borderStyle]"
    )
    red, green, _ = (int(part) for part in re.findall(r"\d+", colours[0])[:3])
    assert red > green
    assert colours[1] == "dashed"
    assert shown(panel, "sign") == "!"
    assert "Allow" not in panel.inner_text()


@in_browser
def test_an_error_is_a_state_of_its_own(page: Page) -> None:
    panel = judged(page, "BROKEN", "unsure")
    assert shown(panel, "title") == "Could not judge: blocked"
    assert shown(panel, "why") == "engine: the engine is out of order; try again"
    assert panel.locator(".label").all_inner_texts() == ["error"]
    assert "(led to no verdict)" in panel.inner_text()
    assert_not_green(panel)


HARMLESS = {
    "request": {"label": "unharmful", "score": 0.1},
    "response": {"label": "not_applicable", "score": None},
    "flagged": False,
    "action": "allow",
    "error": None,
}
ODD: dict[str, Any] = {
    "only an action": {"action": "allow"},
    "an unknown label": {**HARMLESS, "request": {"label": "safe", "score": 0.1}},
    "harmful but not flagged": {**HARMLESS, "response": {"label": "harmful", "score": 0.9}},
    "not decided": {**HARMLESS, "flagged": None},
    "an unknown action": {**HARMLESS, "action": "permit"},
    "an impossible score": {**HARMLESS, "request": {"label": "unharmful", "score": "0"}},
    "an error that lets pass": {**HARMLESS, "error": {"code": "engine", "message": "out of order"}},
    "null": None,
}


ANSWERED = """async bodies => {
    const [prompt, button] = ['prompt', 'judge'].map(id => document.getElementById(id));
    const found = [];
    prompt.value = 'Hello.';
    for (const body of bodies) {
        window.fetch = async () => new Response(body);
        button.click();
        while (button.hidden) await new Promise(done => setTimeout(done, 1));
        const panel = document.querySelector('article');
        found.push([panel.dataset.state, panel.querySelector('.headline').innerText, panel.innerText]);
    }
    return found;
}"""
"""Judges once for each of the bodies that the service is made to answer with."""


@in_browser
def test_what_is_no_verdict_is_never_green(page: Page) -> None:
    bodies = {name: f"event: verdict\ndata: {json.dumps(verdict)}\n\n" for name, verdict in ODD.items()}
    whole = f"event: verdict\ndata: {json.dumps(HARMLESS)}"
    bodies |= {"cut off": whole, "no JSON": "event: verdict\ndata: {\n\n", "empty": "", "HTML": "<p>Allow</p>"}
    *odd, last = page.evaluate(ANSWERED, [*bodies.values(), whole + "\n\n"])
    for name, (state, headline, text) in zip(bodies, odd, strict=True):
        assert (state, "Could not judge: " in headline, "Allow" in text) == ("unsure", True, False), name
    assert last[0] == "allow"


@in_browser
def test_a_refusal_says_why(browser: Browser) -> None:
    down = ScriptedBackend()
    down.is_up = False
    with served({"default": down}) as url, opened(browser, url, expected="Failed to load resource") as page:
        panel = judged(page, "Hello.", "unsure")
        assert shown(panel, "title") == "Could not judge: treat as blocked"
        assert shown(panel, "why") == "engine_down: the engine is being started; try again (in 2 s)"
        assert_not_green(panel)


@in_browser
def test_monitoring_and_failing_open_are_not_green(browser: Browser) -> None:
    with served({"default": ScriptedBackend()}, request={"mode": "monitor"}) as url, opened(browser, url) as page:
        panel = judged(page, "BAD", "unsure")
        assert shown(panel, "title") == "Harmful, but let through by the service's settings"
        panel = judged(page, "BROKEN", "unsure")
        panel.get_by_text("Could not judge: let through by the service's settings").wait_for()
        assert_not_green(panel)


@in_browser
def test_nothing_entered_is_not_asked(page: Page, site: Site) -> None:
    page.get_by_role("button", name="Judge").click()
    page.get_by_text("enter a prompt or a response").wait_for()
    assert site.guard.modes == []


# --- attacks on the page --------------------------------------------------------------------------------


@in_browser
def test_whatever_is_said_is_text(page: Page) -> None:
    before = page.locator("img, script, b").count()
    page.get_by_label("Guard").select_option("other")
    page.get_by_role("button", name="Markup").click()
    page.get_by_role("button", name="Judge").click()
    panel = reached(page, "allow")
    assert shown(panel, "reasoning") == f"Odd. {EVIL}"
    assert EVIL in shown(panel, "facts")
    assert "onerror" in page.get_by_label("Prompt").input_value()
    assert page.locator("img, script, b").count() == before
    page.wait_for_timeout(100)  # a handler that was made would open its dialog by now


@in_browser
def test_the_browser_itself_refuses_html(browser: Browser, site: Site) -> None:
    """If the script used such a sink, the browser would refuse."""
    with opened(browser, site.url, expected="This document requires 'TrustedHTML'") as page:
        error = page.evaluate("""() => {
            try { document.body.innerHTML = '<p>x</p>'; } catch (error) { return error.name; }
        }""")
    assert error == "TypeError"


# --- guards and modes -----------------------------------------------------------------------------------


@in_browser
def test_two_guards_side_by_side(page: Page, site: Site) -> None:
    assert page.get_by_label("Its mode").is_disabled()
    page.get_by_label("Compare with").select_option("other")
    page.get_by_label("Its mode").select_option("hybrid")
    judged(page, "Hello.", "allow")
    page.locator("#panels article[data-state=allow]").nth(1).wait_for()
    assert page.locator("#panels h3").all_inner_texts() == ["default, slow", "other, hybrid"]
    assert site.guard.modes == ["slow"]
    assert site.other.modes[-1] == "hybrid"
    tops = page.locator("#panels article").evaluate_all("panels => panels.map(one => one.getBoundingClientRect().top)")
    assert tops[0] == tops[1]


@in_browser
def test_one_guard_in_two_modes(page: Page, site: Site) -> None:
    page.get_by_label("Compare with").select_option("default")
    judged(page, "Hello.", "allow")
    fast = page.locator("#panels article[data-state=block]")  # scripted to find harm where it does not reason
    fast.wait_for()
    assert sorted(map(str, site.guard.modes)) == ["fast", "slow"]
    assert "Reasoning (none)" in fast.inner_text()


# --- images and examples ------------------------------------------------------------------------------


@in_browser
def test_images_are_sent_as_data_urls(page: Page) -> None:
    chosen: list[FilePayload] = [
        {"name": "a.png", "mimeType": "image/png", "buffer": PNG},
        {"name": "<b>.txt", "mimeType": "text/plain", "buffer": b"words"},
    ]
    unfold(page, "image")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose images").click()
    chooser.value.set_files(chosen)
    page.get_by_text("Not an image, left out: <b>.txt.").wait_for()
    page.evaluate(
        """data => {
        const moved = new DataTransfer();
        moved.items.add(new File([Uint8Array.from(data)], 'b.png', { type: 'image/png' }));
        document.body.dispatchEvent(new DragEvent('drop', { dataTransfer: moved, bubbles: true, cancelable: true }));
    }""",
        list(PNG),
    )
    page.get_by_alt_text("b.png").wait_for()
    page.get_by_role("button", name="Remove a.png").click()
    with page.expect_request("**/v1/guard/stream") as sent:
        page.get_by_role("button", name="Judge").click()
    (url,) = body_of(sent.value)["images"]
    assert url.startswith("data:image/png;base64,")
    reached(page, "allow")


@in_browser
def test_every_example_is_judged(page: Page) -> None:
    for button in page.locator("#examples button").all():
        button.click()
        with page.expect_request("**/v1/guard/stream") as sent:
            page.get_by_role("button", name="Judge").click()
        body = body_of(sent.value)
        assert len(body["prompt"]) > 20
        assert len(body["images"]) == (button.inner_text() == "An image with text")
        assert page.locator("#drop").is_visible() == bool(body["images"])
        assert page.get_by_label("Response", exact=True).is_visible() == bool(body["response"])
        reached(page, "allow")
    assert page.locator("#examples button").count() == 6
    page.get_by_role("button", name="Clear").click()
    assert page.get_by_label("Prompt").input_value() == ""


@in_browser
def test_the_demonstration_guard_says_what_it_is(browser: Browser) -> None:
    backends: dict[str, Backend] = {"default": ScriptedBackend(name="embedded"), "large": ScriptedBackend()}
    with served(backends) as url, opened(browser, url) as page:
        banner = page.get_by_text("Demonstration guard.").locator("..")
        banner.wait_for()
        assert not re.search(r"\d", banner.inner_text())
        page.get_by_label("Guard", exact=True).select_option("large")
        assert banner.is_hidden()
        page.get_by_label("Compare with").select_option("default")
        assert banner.is_visible()


# --- the reasoning --------------------------------------------------------------------------------------

STEPS = """# Task 1
## Reasoning Step 1
The user asks about cars.
## Reasoning Step 2: Thieves could use it.
So the request is **harmful**.
# Task 2
## Reasoning Step 3
There is no response to judge."""


@in_browser
def test_the_reasoning_is_a_list_of_steps(browser: Browser) -> None:
    with served({"default": Talker(reasoning=STEPS)}) as url, opened(browser, url) as page:
        panel = judged(page, "BAD", "block")
        region = panel.get_by_role("region", name="Reasoning")
        assert region.get_by_role("heading").all_inner_texts() == ["The request", "The response"]
        assert region.get_by_role("listitem").all_inner_texts() == [
            "The user asks about cars.",
            "Thieves could use it.\nSo the request is **harmful**.",
            "There is no response to judge.",
        ]
        assert region.get_by_role("list").evaluate_all("lists => lists.map(list => list.start)") == [1, 3]
        assert "#" not in region.inner_text()
        assert shown(panel, "reason") == "Reason given: So the request is harmful."


REASONS = {
    "The request is harmful. It could hurt someone.": "Reason given: It could hurt someone.",
    "No heading, and no full stop": "Reason given: No heading, and no full stop",
    "First.\n\nSo the request is unharmful.": "The reasoning ends with the opposite label.",
    "So it is not harmless: the request is harmful.": "Reason given: So it is not harmless: the request is harmful.",
    "# Task 1\n## Step 1\nOf the request.\n# Task 2\n## Step 2\nOf the response.": "Reason given: Of the request.",
    "# Task 1: look\nOf the request.": "Reason given: Of the request.",
    "word " * 100: f"Reason given: {('word ' * 100)[:240]}…",
    "": "",
}


@in_browser
def test_the_reason_is_the_last_sentence_about_what_decided(page: Page) -> None:
    blocked = {**HARMLESS, "flagged": True, "action": "block", "request": {"label": "harmful", "score": 0.9}}
    bodies = [f"event: verdict\ndata: {json.dumps({**blocked, 'reasoning': reasoning})}\n\n" for reasoning in REASONS]
    for (_, headline, _), reason in zip(page.evaluate(ANSWERED, bodies), REASONS.values(), strict=True):
        lines = [line for line in headline.split("\n") if line]
        assert lines[2:] == ["The request is harmful.", reason][: 1 + bool(reason)]


# --- the same request, for programs ---------------------------------------------------------------------

HOSTILE = "It's \"$HOME\" `id` $(id) \\ !! \\' %s\n'; echo OUT; '\u202eolleh\u009b31m 😀 é"
CURL = 'curl() { for word in "$@"; do printf "%s\\n" "$word" >> words; done; cat > body; }\n'
"""A shell function that writes down what `curl` would get."""


def copied(page: Page, name: str) -> str:
    page.get_by_role("button", name=f"Copy as {name}").click()
    page.get_by_text("Copied.").wait_for()
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


@in_browser
@pytest.mark.parametrize("keys", [(), (KEY,)])
def test_what_was_asked_is_copied_for_programs(
    browser: Browser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    keys: tuple[str, ...],
) -> None:
    """The shell and Python are run: they send what the page sent, and nothing in it is executed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GUARDREASONER_KEY", KEY)
    guard = ScriptedBackend()
    large = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    Image.fromarray(large).save("a photo.png")
    files: list[FilePayload] = [
        {"name": "a photo.png", "mimeType": "image/png", "buffer": Path("a photo.png").read_bytes()},
        {"name": "$(id)'.png", "mimeType": "image/png", "buffer": PNG},
    ]
    may_copy = ["clipboard-read", "clipboard-write"]
    with (
        served({"default": guard}, keys=keys) as url,
        opened(browser, url, expected="Failed to load resource", permissions=may_copy) as page,
    ):
        if keys:
            page.get_by_label("Key of this service").fill(KEY)
            page.keyboard.press("Enter")
        page.locator("#files").set_input_files(files)
        page.get_by_alt_text("$(id)'.png").wait_for()
        with page.expect_request("**/v1/guard/stream") as sent:
            judged(page, HOSTILE, "allow", response=HOSTILE)
        shell, code = copied(page, "curl"), copied(page, "Python")
        assert KEY not in shell + code
        assert not re.search("[\u009b\u202e]", shell + code)
        subprocess.run(["sh", "-c", CURL + shell], check=True)
        exec(code, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a photo.png", "body", "words"]
    assert json.loads(Path("body").read_text("utf-8")) == body_of(sent.value)
    words = Path("words").read_text("utf-8").splitlines()
    assert f"{url}/v1/guard" in words
    assert (f"Authorization: Bearer {KEY}" in words) == bool(keys)
    assert capsys.readouterr().out == "allow unharmful unharmful\n"
    first, second = guard.judged
    assert (first.prompt, first.response) == (second.prompt, second.response)
    assert len(second.images) == 2


@in_browser
def test_where_copying_is_forbidden_the_text_is_selected(page: Page) -> None:
    judged(page, "Hello.", "allow")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.get_by_role("button", name="Copy as Python").click()
    page.get_by_text("The browser forbids copying").wait_for()
    assert 'prompt="Hello.",' in page.evaluate("getSelection().toString()")


@in_browser
def test_the_interface_is_linked(browser: Browser, page: Page) -> None:
    target = page.get_by_role("link", name="OpenAPI").get_attribute("href")
    assert "/v1/guard" in httpx.get(f"{page.url}{target}").json()["paths"]
    with (
        served({"default": ScriptedBackend()}, keys=(KEY,)) as url,
        opened(browser, url, expected="Failed to load resource") as locked,
    ):
        locked.get_by_label("Key of this service").fill(KEY)
        locked.keyboard.press("Enter")
        locked.get_by_role("button", name="Forget key").wait_for()
        with locked.expect_download() as download:
            locked.get_by_role("link", name="OpenAPI").click()
        assert "/v1/guard" in json.loads(download.value.path().read_text("utf-8"))["paths"]


# --- the key --------------------------------------------------------------------------------------------


@in_browser
def test_the_key_is_asked_for_kept_for_the_tab_and_forgotten(browser: Browser) -> None:
    with (
        served({"default": ScriptedBackend()}, keys=(KEY,)) as url,
        opened(browser, url, expected="Failed to load resource") as page,
    ):
        field = page.get_by_label("Key of this service")
        field.fill("not-the-key-of-this-one")
        field.press("Enter")
        page.get_by_text("The service did not accept that key.").wait_for()
        field.fill(f" {KEY} ")
        page.get_by_role("button", name="Use key").click()
        page.get_by_role("button", name="Forget key").wait_for()
        assert field.input_value() == ""
        with page.expect_request("**/v1/guard/stream") as sent:
            judged(page, "Hello.", "allow")
        assert sent.value.headers["authorization"] == f"Bearer {KEY}"
        assert KEY not in page.content() + page.url
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.get_by_role("button", name="Forget key").click()
        assert page.evaluate("sessionStorage.length") == 0
        judged(page, "Hello.", "busy")
        page.get_by_text("This service asks for a key.").wait_for()
        page.keyboard.press("Escape")
        panel = reached(page, "unsure")
        assert shown(panel, "why") == "unauthorised: no key was given"
        assert_not_green(panel)


# --- how it looks ---------------------------------------------------------------------------------------


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_scrolls_only_down(browser: Browser, site: Site, scheme: Any) -> None:
    settings: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
    with opened(browser, site.url, **settings) as page:
        page.get_by_label("Guard").select_option("other")
        panel = judged(page, "A" * 500, "allow", response="word " * 100)
        panel.get_by_text("Verdict as JSON").click()
        width = page.evaluate("document.documentElement.scrollWidth")
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert width <= 360
    assert (int(re.findall(r"\d+", back)[0]) < 64) == (scheme == "dark")


@in_browser
def test_the_verdict_is_beside_the_form_and_stays_in_view(browser: Browser, site: Site) -> None:
    with opened(browser, site.url, viewport={"width": 1280, "height": 850}) as page:
        assert not page.locator("#drop").is_visible()
        judge = page.get_by_role("button", name="Judge")
        field, button = page.get_by_label("Prompt").bounding_box(), judge.bounding_box()
        assert field is not None
        assert button is not None
        assert 0 < button["y"] - field["y"] - field["height"] < 30  # at the foot of the prompt
        headline = judged(page, "Hello.", "allow", response="Hello! " * 400).locator(".headline")
        assert page.evaluate("scrollY") == 0
        box, form = headline.bounding_box(), page.locator("#form").bounding_box()
        assert box is not None
        assert form is not None
        assert box["x"] > form["x"] + form["width"]
        assert box["y"] + box["height"] < 400
        page.locator("#response").evaluate("area => area.style.height = '1500px'")
        page.mouse.wheel(0, 600)
        page.wait_for_timeout(500)  # the page forbids eval, so that no function can be waited for
        assert page.evaluate("scrollY") > 500
        box = headline.bounding_box()
        assert box is not None
        assert 0 < box["y"] < 400
