"""One visitor of the page: a fresh Chromium profile, what can be done in it, and all that goes wrong there.

Elements are found as a visitor finds them, by role and name, so that a test fails too when a screen reader would.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import axe_playwright_python
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Playwright, Request

AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
QUIET_FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
"""Chromium must talk to the server under test and to nothing else."""
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
FADED_IN = """() => Promise.allSettled(document.getAnimations()
  .filter((one) => one.effect.getComputedTiming().endTime < Infinity).map((one) => one.finished))"""
RECORD_POLICY = """
document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`policy violated: ${event.violatedDirective} ${event.blockedURI}`));
"""


def launched(playwright: Playwright) -> Browser:
    """Chromium: $CHROMIUM, else the system's, else the one that `playwright install chromium` brought."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    return playwright.chromium.launch(executable_path=found, args=QUIET_FLAGS)


@dataclass
class Visit:
    """The page, open."""

    page: Page
    faults: list[str] = field(default_factory=list)
    """Exceptions of the page's scripts, violations of its policy, dialogs, and requests to other places."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the completions that the page asked for."""

    def button(self, name: str) -> Locator:
        """The only button of that name."""
        return self.page.get_by_role("button", name=name, exact=True)

    def begin(self) -> None:
        """Leaves the prologue."""
        self.button("Skip the prologue").click()

    def say(self, text: str) -> None:
        """Writes into the message box and sends."""
        box = self.page.get_by_role("textbox", name="What do you say or do?")
        box.fill(text)
        box.press("Enter")

    def hear(self, text: str) -> Locator:
        """Says something and waits for the answer's end; the answer."""
        self.say(text)
        return self.end()

    def end(self) -> Locator:
        """Waits until no answer is under way; the last one."""
        self.page.locator(".turn[aria-busy]").wait_for(state="detached", timeout=60_000)
        return self.answers.last

    @property
    def answers(self) -> Locator:
        """What was told, greeting first."""
        return self.page.locator(".turn.assistant")

    def told(self) -> list[str]:
        """Text of each turn, both sides, without the greeting."""
        texts: list[str] = self.page.locator(".turn .words").all_inner_texts()
        return texts[1:]

    def stories(self) -> list[dict[str, Any]]:
        """The stories as this browser keeps them."""
        kept: dict[str, str] = self.page.evaluate("({ ...localStorage })")
        return [json.loads(kept[key]) for key in sorted(kept) if key.startswith("emerald.story.")]

    def figures(self, answer: Locator) -> dict[str, str]:
        """The terms and values behind an answer, opened as a visitor would."""
        answer.locator("summary").click()
        terms, values = answer.locator("dt").all_inner_texts(), answer.locator("dd").all_inner_texts()
        return dict(zip(terms, values, strict=True))

    def until(self, reached: Callable[[], bool]) -> None:
        """Waits up to 20 seconds, in Python: the page's policy lets no text be run as a script."""
        for _ in range(400):
            if reached():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError("not reached within 20 seconds")

    def accessibility_faults(self) -> list[str]:
        """What axe calls serious or critical, each with its place, once everything has faded in."""
        self.page.evaluate(FADED_IN)
        self.page.evaluate(AXE.read_text(encoding="utf-8"))
        found = self.page.evaluate("axe.run({resultTypes: ['violations']})")
        return [
            f"{violation['id']} ({violation['impact']}) at {node['target']}: {node['failureSummary']}"
            for violation in found["violations"]
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]


@contextmanager
def visiting(browser: Browser, url: str, **context_options: Any) -> Iterator[Visit]:
    """A visit in a profile of its own; the page is not opened yet. AssertionError in the end for any fault."""
    context = browser.new_context(**context_options)
    context.set_default_timeout(20_000)
    context.add_init_script(RECORD_POLICY)
    visit = Visit(context.new_page())

    def requested(request: Request) -> None:
        if not request.url.startswith((url, "blob:")):
            visit.faults.append(f"request to {request.url}")
        if request.url.endswith("/v1/chat/completions"):
            visit.asked.append(json.loads(request.post_data or ""))

    def told(said: ConsoleMessage) -> None:
        if "policy violated" in said.text:
            visit.faults.append(said.text)

    visit.page.on("request", requested)
    visit.page.on("pageerror", lambda fault: visit.faults.append(f"exception: {fault}"))
    visit.page.on("console", told)
    try:
        yield visit
    finally:
        context.close()
    assert not visit.faults
