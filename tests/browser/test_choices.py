"""Choices at the end of a reply: read as in the terminal, and said by a press."""

import json
from typing import Any

from playwright.sync_api import Browser, Page, Route, expect

from tests.browser.visit import visiting
from tests.conftest import ROOT
from tests.serving.server import Server

EXAMPLES = json.loads((ROOT / "tests/serving/choices.json").read_text(encoding="utf-8"))


def told(page: Page, reply: str) -> None:
    """The server's next replies, as these words of the model."""

    def answer(route: Route) -> None:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        choice = {"index": 0, "delta": {"content": reply}, "finish_reason": None}
        figures: dict[str, Any] = {
            "usage": {
                "prompt_tokens": 3,
                "completion_tokens": 5,
                "total_tokens": 8,
                "prompt_tokens_details": {"cached_tokens": 0},
                "energy": {"cpu_seconds": 0.1, "joules": 1.0, "grams_co2e": 0.001, "method": "modelled"},
            },
            "timings": {"ttft_ms": 5.0, "tokens_per_second": 100.0},
        }
        events = [
            {**head, "choices": [choice]},
            {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {**head, "choices": [], **figures},
        ]
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        headers = {"X-Emerald-Source": "model", "X-Emerald-Miss": "none", "X-Emerald-Dropped-Turns": "0"}
        route.fulfill(body=body, content_type="text/event-stream", headers=headers)

    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", answer)


def test_the_examples_become_buttons_that_say_them(chromium: Browser, server: Server) -> None:
    with visiting(chromium, server.url, reduced_motion="reduce") as visit:
        visit.page.goto(server.url)
        visit.begin()
        for example in EXAMPLES:
            if not example["reply"]:
                continue
            told(visit.page, example["reply"])
            answer = visit.hear("I wait.")
            offered = visit.page.get_by_role("group", name="What to do next").get_by_role("button")
            labels = [choice[0].upper() + choice[1:] for choice in example["choices"]]
            assert offered.all_inner_texts() == labels, "the last reply's alone"
            expect(answer.locator(".words b")).to_have_count(0)
            if labels:
                offered.last.click()
                visit.end()
                assert visit.asked[-1]["messages"][-1] == {"role": "user", "content": example["moves"][-1]}


def test_a_ready_answer_and_a_fault_offer_nothing(chromium: Browser, server: Server) -> None:
    with visiting(chromium, server.url, reduced_motion="reduce") as visit:
        visit.page.goto(server.url)
        visit.begin()
        visit.hear("Who is the Wizard?")
        expect(visit.page.get_by_role("group", name="What to do next")).to_have_count(0)
