"""The page in a real browser, against a server that answers from a script."""

import math
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from page_server import MODEL, PAGE, Script, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
SKY = "Why is the sky blue?"
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def script() -> Script:
    return Script(pause=0.001)


@pytest.fixture
def visit(browser: Any, script: Script) -> Iterator[Open]:
    """Open the page as a device would; whatever it complains of in the console fails the test."""
    complaints: list[str] = []
    contexts = []

    def opened(width: int = 1280, height: int = 900, ready: bool = True, **device: Any) -> Any:
        size = {"width": width, "height": height}
        contexts.append(browser.new_context(viewport=size, **device))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        if ready:
            sync_api.expect(page.locator("#model")).to_have_text(MODEL["id"])
        return page

    with serving(script) as address:
        yield opened
        for context in contexts:
            context.close()
    # The browser notes each refusal and each connection that goes; those are asked for here. So is
    # the field for a key, which may have the focus before the prompt would get it.
    asked_for = ("Failed to load resource", "Autofocus processing was blocked")
    assert [text for text in complaints if not text.startswith(asked_for)] == []


def ended(page: Any) -> None:
    """Wait until the page can be asked again."""
    page.locator("#send").wait_for()


def ask(page: Any, prompt: str = SKY, **settings: str) -> None:
    """Set and send, and wait for the end."""
    for name, value in settings.items():
        control = page.locator(f"#{name}")
        if control.evaluate("node => node.tagName") == "SELECT":
            control.select_option(value)
        else:
            control.fill(value)
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    ended(page)


def costs(answer: Any) -> dict[str, str]:
    rows = answer.locator("dl div").all_inner_texts()
    return dict(row.split("\n", 1) for row in rows)


def test_the_page_is_one_file_that_a_strict_policy_lets_through() -> None:
    page = PAGE.read_text(encoding="utf-8")
    page.encode("ascii")
    assert len(re.findall(r"<style\b", page)) == len(re.findall(r"<script\b", page)) == 1
    assert not re.search(r"\s(style|on\w+)=", page.split("<script>")[0].split("</style>")[1])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", page)
    assert set(re.findall(r"https?://[\w.]+", page)) == {"http://www.w3.org"}


def test_every_token_of_an_answer_tells_its_depth_by_colour_height_and_words(
    visit: Open, script: Script
) -> None:
    page = visit()
    ask(page, rule="kl", first="16")
    tokens = page.locator(".text .token")
    assert page.locator(".text").inner_text().split() == "".join(script.tokens(16)).split()
    looks = {}
    for depth in ("1", "2", "14"):
        token = page.locator(f'.text .token[data-depth="{depth}"]').first
        noun = "iteration" if depth == "1" else "iterations"
        assert token.get_attribute("title") == f"{depth} {noun}"
        style = "node => [getComputedStyle(node).backgroundImage, getComputedStyle(node)"
        looks[depth] = token.evaluate(style + ".backgroundSize]")
    assert len({look[0] for look in looks.values()}) == len({look[1] for look in looks.values()})
    assert len({look[0] for look in looks.values()}) == 3
    number = "node => getComputedStyle(node, '::after').content"
    assert tokens.first.evaluate(number) == "none"
    page.check("#numbers")
    assert tokens.first.evaluate(number) == '"2"'


def test_tokens_appear_while_the_answer_is_made(visit: Open, script: Script) -> None:
    script.pause = 0.03
    page = visit()
    page.fill("#prompt", SKY)
    page.keyboard.press("Enter")
    page.locator(".text .token").nth(3).wait_for()
    assert page.locator("#stop").is_visible()
    assert page.locator(".text .token").count() < len(script.tokens(4))
    assert page.locator(".answer").get_attribute("aria-busy") == "true"


def test_the_cost_stands_beside_the_answer(visit: Open, script: Script) -> None:
    page = visit()
    ask(page, rule="kl", first="16")
    found = costs(page.locator(".answer"))
    count = len(script.tokens(16))
    depths = script.depths(script.asked[0], count)
    assert found["Tokens"] == str(count)
    assert found["Iterations"] == f"{sum(depths) / count:.1f} mean, 14 max"
    assert found["Share of depth 16"] == f"{round(100 * sum(depths) / count / 16)} %"
    flops = (1.9e8 * count + 5.4e7 * (sum(depths) + 9 * 16)) / 1e9
    assert found["FLOPs executed"] == f"{flops:.3g} GFLOP"
    assert set(found) >= {"Time", "To the first token", "Tokens a second"}
    told = page.locator(".cost svg").get_attribute("aria-label")
    assert f"{depths.count(14)} tokens took 14 iterations" in told
    assert page.locator(".cost rect").count() == len(set(depths))


def test_settings_are_sent_as_the_server_reads_them(visit: Open, script: Script) -> None:
    page = visit()
    ask(page, first="3", tokens="5", temperature="0.7", seed="11")
    ask(page, rule="kl", **{"limit-kind": "2%"})
    ask(page, rule="state_distance", threshold="0.03")
    plain, calibrated, own = script.asked
    assert "exit" not in plain
    del plain["messages"]
    assert plain == {
        "model": MODEL["id"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 5,
        "temperature": 0.7,
        "seed": 11,
        "num_recurrences": 3,
    }
    assert calibrated["exit"] == {"rule": "kl", "tolerance": "2%"}
    assert own["exit"] == {"rule": "state_distance", "threshold": 0.03}
    assert "at the limit of tokens" in page.locator("h3").first.inner_text()
    assert "gate" not in " ".join(page.locator("#rule option").all_inner_texts())


def test_two_depths_are_asked_at_once_and_set_against_each_other(
    visit: Open, script: Script
) -> None:
    script.pause = 0.02
    page = visit()
    page.check("#compare")
    ask(page, first="4", second="16")
    assert script.most_at_once == 2
    assert {asked["num_recurrences"] for asked in script.asked} == {4, 16}
    boxes = [answer.bounding_box() for answer in page.locator(".answer").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    shallow, deep = (costs(answer) for answer in page.locator(".answer").all())
    assert deep["Share of the dearer"] == "100 %" != shallow["Share of the dearer"]
    shared = script.tokens(4).index("What")
    told = page.locator(".between").inner_text()
    assert f"The first {shared} tokens are the same" in told
    assert re.search(r"Depth 16 executed \d\.\d times the FLOPs of depth 4", told)
    assert page.locator(".parting").all_inner_texts() == ["What", "At"]


def test_a_chat_goes_on_from_the_answer_that_is_chosen(visit: Open, script: Script) -> None:
    page = visit()
    page.check("#compare")
    ask(page, first="4", second="16")
    page.get_by_label("Go on from this answer").nth(1).check()
    page.uncheck("#compare")
    ask(page, "And at sunset?")
    past = script.asked[-1]["messages"]
    assert [message["role"] for message in past] == ["user", "assistant", "user"]
    assert past[1]["content"] == "".join(script.tokens(16))
    page.get_by_label("Single prompt: left out").check()
    ask(page, "And at night?")
    assert script.asked[-1]["messages"] == [{"role": "user", "content": "And at night?"}]
    page.get_by_role("button", name="Start over").click()
    assert page.locator(".turn").count() == 0


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stopping_leaves_what_is_there_and_tells_the_server(
    visit: Open, script: Script, way: str
) -> None:
    script.pause = 0.03
    page = visit()
    page.fill("#prompt", SKY)
    page.keyboard.press("Enter")
    page.locator(".text .token").nth(3).wait_for()
    page.get_by_role("button", name="Stop").click() if way == "button" else page.keyboard.press(way)
    ended(page)
    assert script.left.wait(5)
    assert "stopped" in page.locator("h3").inner_text()
    assert costs(page.locator(".answer"))["FLOPs executed"] == "not told"
    assert page.locator("#prompt").evaluate("node => node === document.activeElement")


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (
            {"refusal": (429, "the queue is full", 7)},
            "The queue is full; ask again in 7 seconds.",
        ),
        ({"refusal": (400, "num_recurrences is too deep", None)}, "Num_recurrences is too deep."),
        ({"breaks_after": 3}, "the engine failed: see the server's log"),
        ({"drops": True}, "The connection ended before the answer did."),
    ],
)
def test_what_goes_wrong_is_told_in_one_sentence(
    visit: Open, script: Script, trouble: dict[str, Any], told: str
) -> None:
    vars(script).update(trouble)
    page = visit()
    ask(page)
    assert page.locator(".answer .trouble").inner_text() == told
    assert told in page.locator("#status").inner_text()
    # What was refused can be sent again as it was.
    assert page.locator("#prompt").input_value() == (SKY if script.refusal else "")


def test_a_server_that_is_gone_is_told(visit: Open) -> None:
    page = visit()
    page.context.set_offline(True)
    ask(page)
    told = page.locator(".answer .trouble").inner_text()
    assert told == "The server does not answer; is it still running?"


def test_a_key_is_asked_for_where_one_is_needed(visit: Open, script: Script) -> None:
    script.key = "rondo-acme.1.secret"
    page = visit(ready=False)
    key = page.get_by_label("Key", exact=True)
    key.wait_for()
    sync_api.expect(page.locator("#trouble")).to_have_text("A key is needed.")
    key.fill("wrong")
    page.get_by_role("button", name="Use this key").click()
    sync_api.expect(page.locator("#trouble")).to_have_text("A key is needed.")
    key.wait_for()
    key.fill(script.key)
    key.press("Enter")
    sync_api.expect(page.locator("#model")).to_have_text(MODEL["id"])
    assert page.locator("#sign").is_hidden()
    assert page.locator("#trouble").is_hidden()
    ask(page)
    assert page.locator(".answer .token").count() > 10
    assert script.key not in page.content()
    # A key that was revoked meanwhile is asked for again.
    script.key = "rondo-acme.2.secret"
    ask(page)
    key.wait_for()


def test_all_can_be_done_by_keyboard(visit: Open, script: Script) -> None:
    page = visit()
    keys = page.keyboard
    order = []
    for _ in range(20):
        keys.press("Shift+Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if order[-1] == "first":
            break
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) != "none", order[-1]
    assert {"compare", "rule", "tokens", "temperature", "numbers", "first"} <= set(order)
    keys.press("ArrowRight")
    assert page.locator("#first-shown").inner_text() == "5"
    assert page.locator("#first").get_attribute("aria-valuetext") == "5 iterations"
    while page.evaluate("document.activeElement.id") != "compare":
        keys.press("Tab")
    keys.press("Space")
    assert page.locator("#second").is_visible()
    while page.evaluate("document.activeElement.id") != "prompt":
        keys.press("Tab")
    keys.type("Two lines")
    keys.press("Shift+Enter")
    keys.type("in one prompt")
    keys.press("Enter")
    ended(page)
    assert script.asked[0]["messages"][-1]["content"] == "Two lines\nin one prompt"


def test_a_phone_shows_all_without_scrolling_sideways(visit: Open, script: Script) -> None:
    script.text = "A word of " + "great" * 40 + " length, and more."
    page = visit(360, 740, has_touch=True, is_mobile=True)
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) == 360
    page.check("#compare")
    page.check("#numbers")
    page.locator("summary").click()
    ask(page, rule="kl", first="32")
    assert page.evaluate(wide) == 360
    boxes = [answer.bounding_box() for answer in page.locator(".answer").all()]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    small = "nodes => nodes.filter(n => n.offsetParent && n.offsetHeight < 44).map(n => n.id)"
    assert page.locator("button, .check, summary").evaluate_all(small) == []


def test_what_a_model_writes_is_shown_and_never_run(visit: Open, script: Script) -> None:
    script.text = "<img src=x onerror=alert(1)> <script>alert(2)</script> &amp; **bold**"
    page = visit()
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    ask(page, "<b>mine</b>")
    assert page.locator(".text").inner_text() == script.text
    assert page.locator("#log img, #log script, #log b").count() == 0
    assert "<b>mine</b>" in page.locator(".turn h2").inner_text()


def test_text_that_was_held_back_ends_the_answer(visit: Open, script: Script) -> None:
    script.hold_back = True
    page = visit()
    ask(page)
    assert page.locator(".text").inner_text().split() == "".join(script.tokens(4)).split()
    assert costs(page.locator(".answer"))["Tokens"] == str(len(script.tokens(4)))


def test_a_screen_reader_hears_names_and_the_answer_once(visit: Open, script: Script) -> None:
    page = visit()
    page.evaluate(
        "window.heard = []; new MutationObserver(() => heard.push(by('status').textContent))"
        ".observe(by('status'), {childList: true})"
    )
    page.check("#compare")
    ask(page, rule="entropy", first="2")
    heard = page.evaluate("heard")
    assert len(heard) == 2
    assert heard[0] == "Answering at depth 2 and 16."
    assert "Answer at depth 2: The sky looks blue" in heard[1]
    assert "iterations on average" in heard[1]
    told = page.locator("body").aria_snapshot()
    for part in (
        'slider "First depth"',
        'slider "Second depth"',
        'checkbox "Compare two depths" [checked]',
        'combobox "Exit: a token may leave the loop early"',
        'spinbutton "Own threshold"',
        'spinbutton "Temperature"',
        'radio "Chat: sent along" [checked]',
        'textbox "Prompt"',
        'button "Send"',
        f'heading "You asked: {SKY}" [level=2]',
        'region "Answer at depth 2"',
        "main",
        'heading "Rondo" [level=1]',
    ):
        assert part in told, told
    nameless = "nodes => nodes.filter(n => !n.labels?.length && !n.ariaLabel).map(n => n.id)"
    assert page.locator("input, select, textarea").evaluate_all(nameless) == []


CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const pixel = (colours) => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  };
  const light = (colours) => {
    const [r, g, b] = pixel(colours);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  return [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility()
    && !node.matches("script, style, .heard, .heard *, .skip, option") && [...node.childNodes]
    .some((child) => child.nodeType === 3 && child.data.trim())).map((node) => {
      const under = [];
      for (let up = node; up; up = up.parentElement) {
        under.unshift(getComputedStyle(up).backgroundColor);
      }
      const style = getComputedStyle(node);
      const ink = node instanceof SVGElement ? style.fill : style.color;
      const [low, high] = [light(under), light([...under, ink])].sort((a, b) => a - b);
      return [high / low, node.tagName + " " + node.textContent.slice(0, 30)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_under_it(visit: Open, script: Script, scheme: str) -> None:
    page = visit(color_scheme=scheme)
    page.check("#compare")
    ask(page, rule="kl", first="2", second="32")
    script.refusal = (500, "the engine failed", None)
    ask(page)
    found = page.evaluate(CONTRASTS)
    assert len(found) > 100
    assert [line for line in found if line[0] < 4.5] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_doubling_of_depth_is_one_even_step_of_colour(visit: Open, scheme: str) -> None:
    page = visit(color_scheme=scheme)
    assert page.locator("#legend .token").all_inner_texts() == ["1", "2", "4", "8", "16", "32"]
    read = "depth => document.documentElement.style.getPropertyValue(`--d${depth}`)"
    colours = [page.evaluate(read, 2**power) for power in range(6)]
    places = [[float(part) for part in re.findall(r"-?\d\.\d+", colour)] for colour in colours]
    steps = [math.dist(*pair) for pair in pairwise(places)]
    assert max(steps) < 1.15 * min(steps)
    # Lightness alone, which every kind of colour vision keeps, orders the scale evenly too.
    falls = [(one[0] - two[0]) * (1 if scheme == "light" else -1) for one, two in pairwise(places)]
    assert min(falls) > 0.05
    assert max(falls) < 1.15 * min(falls)


def test_nothing_moves_for_those_who_want_no_motion(visit: Open, script: Script) -> None:
    script.pause = 0.05
    moves = "getComputedStyle(document.querySelector('.waiting'), '::after').animationName"
    for motion, name in (("reduce", "none"), ("no-preference", "blink")):
        page = visit(reduced_motion=motion)
        page.fill("#prompt", SKY)
        page.keyboard.press("Enter")
        page.wait_for_selector(".waiting")
        assert page.evaluate(moves) == name
        page.keyboard.press("Escape")
        ended(page)
