"""When the server refuses, breaks off or is gone: the page says so, loses nothing, and asks again."""

import http.client
import json
import threading
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Response, expect

from tests.browser.slowed import SHORT_REPLIES
from tests.browser.visit import Visit, visiting
from tests.serving.server import figure, serving, wait_until_ready

Opened = Callable[..., Visit]
WALK = "I walk through the market and look at every stall."
ONE_AT_A_TIME = {"EMERALD_RUNNING": "1", "EMERALD_WAITING": "0", "EMERALD_REPLY_TOKENS": "256"}


def test_a_full_server_is_asked_again_until_it_answers(chromium: Browser, embedded_build: Path) -> None:
    """Another client's replies take the only place, until the page has been refused."""
    with serving(embedded_build, **ONE_AT_A_TIME) as server, visiting(chromium, server.url) as visit:
        wait_until_ready(server.port)
        visit.page.goto(server.url)
        visit.begin()
        refused = threading.Event()
        occupier = threading.Thread(target=occupy, args=(server.port, refused))
        occupier.start()
        while figure(server.port, "vllm:num_requests_running") < 1:
            visit.page.wait_for_timeout(10)
        statuses: list[int] = []

        def answered(response: Response) -> None:
            if response.url.endswith("/completions"):
                statuses.append(response.status)

        visit.page.on("response", answered)
        visit.say(WALK)
        expect(visit.page.get_by_role("status")).to_contain_text("asking again in")
        refused.set()
        expect(visit.end()).to_contain_text("Told by the model")
        occupier.join()
        assert statuses[0] == 429
        assert statuses[-1] == 200


def test_a_server_that_dies_leaves_what_was_told_and_can_be_asked_again(
    chromium: Browser, embedded_build: Path
) -> None:
    with visiting(chromium, "http://127.0.0.1") as visit:
        with serving(embedded_build, **SHORT_REPLIES) as server:
            wait_until_ready(server.port)
            visit.page.goto(server.url)
            visit.begin()
            visit.say(WALK)
            growing = visit.page.locator(".turn.assistant[aria-busy] .words")
            expect(growing).not_to_have_text("")
            server.process.kill()
            answer = visit.end()
        expect(answer).to_contain_text("The answer breaks off: the connection was cut.")
        told = answer.locator(".words").inner_text()
        assert told

        visit.button("Try again").click()
        expect(visit.page.get_by_role("status")).to_have_text("No other answer: the server cannot be reached.")
        assert visit.told()[-1] == told, "what there was stays"
        visit.hear("I wait.")
        expect(visit.answers.last).to_contain_text("No answer: the server cannot be reached.")
        assert visit.accessibility_faults() == []

        with serving(embedded_build, PORT=str(server.port), **SHORT_REPLIES):
            wait_until_ready(server.port)
            visit.button("Try again").click()
            expect(visit.end()).to_contain_text("Told by the model")
        assert [turn["role"] for turn in visit.stories()[0]["turns"]] == ["user", "assistant"] * 2


def test_a_refusal_that_waiting_does_not_mend_is_said(visit: Opened) -> None:
    visitor = visit()
    visitor.begin()
    answer = visitor.hear("wizard " * 9000)
    expect(answer).to_contain_text("No answer: the message is too long")
    expect(visitor.button("Try again")).to_be_visible()


def test_a_browser_that_keeps_nothing_says_so_and_goes_on(visit: Opened) -> None:
    visitor = visit()
    visitor.page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('quota', 'QuotaExceededError'); } }"
    )
    visitor.begin()
    expect(visitor.page.get_by_role("status")).to_contain_text("This browser keeps no more stories")
    expect(visitor.hear("Who is the Wizard?")).to_contain_text("Ready answer")
    assert visitor.stories() == []


def occupy(port: int, until: threading.Event) -> None:
    """One long reply after the other; hangs up in the middle of the last."""
    body = {"messages": [{"role": "user", "content": WALK}], "emerald": {"cache": False}, "stream": True}
    while not until.is_set():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        while answer.readline() and not until.is_set():
            pass
        connection.close()
