"""Chromium, a real server on the real embedded build, and visits to its page."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.browser.slowed import SHORT_REPLIES
from tests.browser.visit import Visit, launched, visiting
from tests.serving.server import Server, serving, wait_until_ready


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for all tests; each visit gets a profile of its own."""
    with sync_playwright() as playwright:
        browser = launched(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server(embedded_build: Path) -> Iterator[Server]:
    """Loaded and ready."""
    with serving(embedded_build, **SHORT_REPLIES) as server:
        wait_until_ready(server.port)
        yield server


@pytest.fixture
def visit(chromium: Browser, server: Server) -> Iterator[Callable[..., Visit]]:
    """Opens the page, with options of Playwright's contexts; whatever goes wrong on it fails the test."""
    with ExitStack() as stack:

        def opened(**context_options: Any) -> Visit:
            one = stack.enter_context(visiting(chromium, server.url, **context_options))
            one.page.goto(server.url)
            one.page.locator(".scene").first.wait_for()
            return one

        yield opened
