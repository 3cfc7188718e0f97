"""Make the pictures of the page in docs/: a question asked in a real browser.

    rondo serve out/final                                 # in another terminal
    python docs/page_pictures.py --url http://127.0.0.1:8000/ --exit kl --threshold 0.001

Without --url a server answers from a script, to look at the page alone: then give another
--output-dir, since what docs/ shows is a model's own answer. Needs playwright and a Chromium.
"""

import argparse
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[1]


def arguments() -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--url", help="address of a server; the tests' stand-in otherwise")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "docs")
    parser.add_argument("--prompt", default="Why is the sky blue?")
    parser.add_argument("--depths", type=int, nargs=2, default=[2, 8])
    parser.add_argument("--exit", help="rule by which tokens leave, none unless given")
    parser.add_argument("--threshold", type=float, help="the calibrated one unless given")
    parser.add_argument("--tokens", type=int, default=60, help="most tokens of an answer")
    parser.add_argument("--minutes", type=float, default=10, help="how long an answer may take")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser")
    flags = parser.parse_args()
    if flags.url is None and flags.output_dir.resolve() == ROOT / "docs":
        parser.error("give --url of a server with a model, or an --output-dir other than docs/")
    if flags.chromium is None:
        parser.error("there is no chromium on the PATH: give --chromium")
    return flags


def stand_in() -> AbstractContextManager[str]:
    """Return the server of the tests."""
    sys.path.insert(0, str(ROOT / "tests" / "serving"))
    from page_server import Script, serving

    return serving(Script())


def settle(page: Page, flags: argparse.Namespace) -> None:
    """Choose exit and length; on a phone they lie folded up."""
    folded = page.locator("#more:not([open]) summary")
    was_folded = folded.count() > 0
    if was_folded:
        folded.click()
    if flags.exit:
        page.select_option("#rule", flags.exit)
    if flags.threshold is not None:
        page.select_option("#limit-kind", "", force=True)
        page.fill("#threshold", f"{flags.threshold:g}")
    page.fill("#tokens", str(flags.tokens))
    if was_folded:
        page.locator("summary").click()


def ask(page: Page, flags: argparse.Namespace) -> None:
    """Ask, and wait for the end.

    Raises:
        SystemExit: The server refused.
    """
    page.fill("#prompt", flags.prompt)
    page.keyboard.press("Enter")
    page.locator("#send").wait_for(timeout=60_000 * flags.minutes)
    if page.locator(".trouble:visible").count():
        raise SystemExit(page.locator(".trouble:visible").first.inner_text())


def picture(browser: Browser, url: str, flags: argparse.Namespace, phone: bool) -> Path:
    """Ask one question at two depths, or on a phone at the deeper alone, and take a picture."""
    width, height = (390, 844) if phone else (1280, 900)
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
    page.goto(url)
    page.locator("#first-shown:not(:empty)").wait_for()
    settle(page, flags)
    if phone:
        page.locator("#first").fill(str(max(flags.depths)))
    else:
        page.check("#compare")
        for name, depth in zip(("first", "second"), flags.depths, strict=True):
            page.locator(f"#{name}").fill(str(depth))
    ask(page, flags)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    path = flags.output_dir / f"page-{'phone' if phone else 'desktop'}.png"
    page.screenshot(path=path)
    page.close()
    return path


def main() -> None:
    """Take both pictures."""
    flags = arguments()
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    server = stand_in() if flags.url is None else nullcontext(flags.url)
    with server as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=flags.chromium)
        for phone in (False, True):
            print(picture(browser, url, flags, phone))
        browser.close()


if __name__ == "__main__":
    main()
