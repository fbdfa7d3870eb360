"""Draws docs/screenshots anew: python -m tests.browser.screenshots (which is what `make screenshots` runs).

A real server, the real model: a prologue while it loads, an answer of its own, a ready answer, a phone, the dark.
"""

import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.browser.slowed import slowed
from tests.browser.visit import PHONE, Visit, launched, visiting
from tests.conftest import ROOT
from tests.serving.server import serving, wait_until_ready

FOLDER = ROOT / "docs/screenshots"
BUILD = ROOT / "build/embedded"
DESKTOP = {"viewport": {"width": 1120, "height": 760}}
CHOICES = ["A brass lantern", "A talkative field mouse", "Everything there is to see", "The hot cakes"]
WALK = "Tell me what I see as I walk through the gates of the Emerald City."
ASK = "Could you tell me who the Wizard is, please?"
REPEATABLE = """
const ask = window.fetch;
const settings = { seed: 2, temperature: 0.6, stop: "\\n\\n" };
window.fetch = (path, options) => {
  if (!options?.body) return ask(path, options);
  return ask(path, { ...options, body: JSON.stringify({ ...JSON.parse(options.body), ...settings }) });
};
"""


def main() -> int:
    """Writes every picture; 0 when all are there."""
    if not (BUILD / "engine").is_dir():
        print(f'no {BUILD.relative_to(ROOT)}/engine: run "make pipeline"', file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = launched(playwright)
        prologue(browser)
        with serving(BUILD, EMERALD_REPLY_TOKENS="160") as server:
            wait_until_ready(server.port)
            answers(browser, server.url)
            phone(browser, server.url)
        browser.close()
    return 0


def prologue(browser: Browser) -> None:
    """While the model loads."""
    with slowed(BUILD) as loading, visiting(browser, loading.url, **DESKTOP, reduced_motion="reduce") as visit:
        visit.page.goto(loading.url)
        bar = visit.page.get_by_role("progressbar")
        loading.until(
            visit.page,
            lambda: (
                visit.button(CHOICES[0]).is_visible() and bar.is_visible() and bar.evaluate("(bar) => bar.value") > 0.2
            ),
        )
        visit.button(CHOICES[0]).click()
        picture(visit, "prologue", at_end=False)


def answers(browser: Browser, url: str) -> None:
    """The model's and a ready one, light and dark."""
    with visiting(browser, url, **DESKTOP, reduced_motion="reduce") as visit:
        tell(visit, url)
        visit.figures(visit.hear(WALK))
        picture(visit, "answer")
        visit.figures(visit.hear(ASK))
        picture(visit, "ready-answer")
    with visiting(browser, url, **DESKTOP, reduced_motion="reduce", color_scheme="dark") as visit:
        tell(visit, url)
        visit.hear(WALK)
        picture(visit, "dark")


def phone(browser: Browser, url: str) -> None:
    """A small screen."""
    with visiting(browser, url, **PHONE, reduced_motion="reduce") as visit:
        tell(visit, url)
        visit.hear(ASK)
        picture(visit, "phone")


def tell(visit: Visit, url: str) -> None:
    """Opens the page and walks the prologue; the model's answers are repeatable."""
    visit.page.add_init_script(REPEATABLE)
    visit.page.goto(url)
    for label in CHOICES:
        visit.button(label).click()
    visit.button("Begin the story").click()


def picture(visit: Visit, name: str, *, at_end: bool = True) -> None:
    """The page as it is, at the story's beginning or end."""
    visit.page.locator("#message").focus()
    visit.page.locator("#scroll").evaluate("(story, top) => { story.scrollTop = top }", 100_000 if at_end else 0)
    visit.page.evaluate("document.fonts.ready")
    path = Path(FOLDER / f"{name}.png")
    visit.page.screenshot(path=path)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
