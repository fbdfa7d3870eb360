"""Talking: answers that grow, can be stopped, told anew, changed and taken away, and stories that stay."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.visit import Visit
from tests.serving.server import Server, figure

Opened = Callable[..., Visit]
READY, LIKE = "Who is the Wizard?", "Could you tell me who the Wizard is, please?"
SOME_WORDS = re.compile(r"\w")
WALK = "I walk through the market and look at every stall."
LENGTHS = """() => {
  window.lengths = [];
  new MutationObserver(() => {
    const words = document.querySelector(".turn.assistant[aria-busy] .words");
    if (words) window.lengths.push(words.textContent.length);
  }).observe(document.getElementById("turns"), { childList: true, subtree: true });
}"""

LISTEN = """() => {
  const connect = AudioNode.prototype.connect;
  AudioNode.prototype.connect = function (to, ...rest) {
    if (to instanceof AudioDestinationNode) {
      const ear = new AnalyserNode(this.context);
      connect.call(this, ear);
      window.loudness = () => {
        const samples = new Float32Array(ear.fftSize);
        ear.getFloatTimeDomainData(samples);
        return Math.max(...samples.map(Math.abs));
      };
    }
    return connect.call(this, to, ...rest);
  };
}"""


@pytest.fixture
def visitor(visit: Opened) -> Visit:
    """With the prologue behind."""
    visitor = visit()
    visitor.begin()
    return visitor


def test_an_answer_is_seen_growing(visitor: Visit) -> None:
    visitor.page.evaluate(LENGTHS)
    answer = visitor.hear(WALK)
    lengths = visitor.page.evaluate("window.lengths")
    assert lengths == sorted(lengths)
    assert len(set(lengths)) >= 5
    assert lengths[0] < lengths[-1] <= len(answer.locator(".words").inner_text()) + 5
    expect(answer).to_contain_text("tokens/s")
    figures = visitor.figures(answer)
    assert {"Prompt", "Reply", "Speed", "First word", "Processor", "Energy", "CO₂e", "No ready answer"} == set(figures)
    assert "modelled" in figures["Energy"] or "metered" in figures["Energy"]


def test_stop_keeps_what_was_told_and_frees_the_server(visitor: Visit, server: Server) -> None:
    """The server stands still while the visitor stops, so that it cannot have ended by itself."""
    aborted = figure(server.port, 'vllm:request_success_total{finished_reason="abort"}')
    visitor.say(WALK)
    growing = visitor.page.locator(".turn.assistant[aria-busy] .words")
    expect(growing).to_have_text(SOME_WORDS)
    server.process.send_signal(signal.SIGSTOP)
    try:
        visitor.button("Stop").click()
        answer = visitor.end()
    finally:
        server.process.send_signal(signal.SIGCONT)
    expect(answer).to_contain_text("stopped")
    told = answer.locator(".words").inner_text()
    assert told
    visitor.until(lambda: figure(server.port, 'vllm:request_success_total{finished_reason="abort"}') == aborted + 1)
    visitor.until(lambda: figure(server.port, "vllm:num_requests_running") == 0)
    assert visitor.told()[-1] == told
    expect(visitor.button("Send")).to_be_visible()
    expect(visitor.hear("I rest.")).to_contain_text("Told by the model")


def test_escape_stops_too(visitor: Visit) -> None:
    visitor.say(WALK)
    expect(visitor.page.locator(".turn.assistant[aria-busy] .words")).to_have_text(SOME_WORDS)
    visitor.page.keyboard.press("Escape")
    expect(visitor.page.get_by_role("status")).to_have_text("Stopped.")


def test_an_answer_by_likeness_shows_entry_and_certificate(visitor: Visit, embedded_build: Path) -> None:
    sealed = json.loads((embedded_build / "certificate.json").read_text(encoding="utf-8"))
    bound = f"{100 * round(sealed['false_hits']['upper'], 4):.1f} %"
    answer = visitor.hear(LIKE)
    expect(answer).to_contain_text(f"Ready answer, certified: at most {bound} of such answers are wrong")
    figures = visitor.figures(answer)
    assert figures["Entry"] == "who-is-the-wizard"
    assert figures["Certificate"] == sealed["seal"]
    assert bound in figures["Certified"]
    assert "Speed" not in figures

    exact = visitor.hear(READY)
    expect(exact).to_contain_text("Ready answer to these very words")
    assert "no certificate" in visitor.figures(exact)["Found by"]


def test_regenerate_asks_the_model_in_place_of_the_answer(visitor: Visit) -> None:
    ready = visitor.hear(READY).locator(".words").inner_text()
    visitor.button("Regenerate").click()
    answer = visitor.end()
    expect(answer).to_contain_text("Told by the model")
    assert visitor.asked[-1]["emerald"]["cache"] is False
    assert visitor.asked[-1]["messages"] == visitor.asked[0]["messages"]
    assert visitor.told()[-1] != ready
    assert len(visitor.told()) == 2


def test_edit_goes_on_from_there(visitor: Visit) -> None:
    visitor.hear(READY)
    visitor.hear(WALK)
    visitor.button("Edit").first.click()
    box = visitor.page.get_by_role("textbox", name="Change what you said")
    expect(box).to_be_focused()
    expect(box).to_have_value(READY)
    box.press("Escape")
    expect(visitor.button("Edit").first).to_be_focused()
    assert len(visitor.told()) == 4

    visitor.button("Edit").first.click()
    box.fill("What are you capable of?")
    visitor.button("Send again").click()
    expect(visitor.end()).to_contain_text("Ready answer")
    assert visitor.told()[0] == "What are you capable of?"
    assert len(visitor.told()) == 2
    assert visitor.asked[-1]["messages"] == [{"role": "user", "content": "What are you capable of?"}]


def test_an_answer_that_ends_leaves_an_open_editor_alone(visitor: Visit) -> None:
    visitor.hear(READY)
    visitor.say(WALK)
    visitor.button("Edit").first.click()
    box = visitor.page.get_by_role("textbox", name="Change what you said")
    box.fill("Half a thought")
    visitor.end()
    expect(box).to_have_value("Half a thought")
    expect(box).to_be_focused()


def test_copy_puts_the_text_on_the_clipboard(visitor: Visit) -> None:
    visitor.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = visitor.hear(READY)
    answer.get_by_role("button", name="Copy").click()
    expect(visitor.page.get_by_role("status")).to_have_text("Copied.")
    copied = visitor.page.evaluate("navigator.clipboard.readText()")
    assert copied == visitor.stories()[0]["turns"][-1]["text"]


def test_export_is_markdown_with_origins(visitor: Visit, tmp_path: Path) -> None:
    visitor.hear(LIKE)
    visitor.hear(WALK)
    with visitor.page.expect_download() as download:
        visitor.button("Export").click()
    assert download.value.suggested_filename.endswith(".md")
    download.value.save_as(tmp_path / "story.md")
    lines = (tmp_path / "story.md").read_text(encoding="utf-8").split("\n\n")
    turns = visitor.stories()[0]["turns"]
    assert lines[0] == f"# {LIKE}"
    assert lines[1] == f"**You:** {LIKE}"
    assert turns[1]["text"] in lines
    assert any(line.startswith("*Ready answer, certified") for line in lines)
    assert any(line.startswith("*Told by the model · ") for line in lines)


def test_stories_survive_a_reload_and_stay_apart(visitor: Visit) -> None:
    visitor.hear(READY)
    first = visitor.told()
    visitor.button("New story").first.click()
    visitor.begin()
    visitor.hear("What are you capable of?")
    second = visitor.told()
    visitor.page.reload()
    expect(visitor.answers).to_have_count(2)
    assert visitor.told() == second
    visitor.button(READY).click()
    assert visitor.told() == first
    visitor.hear("How can I interact with you?")
    assert visitor.asked[-1]["messages"][0]["content"] == READY
    assert len(visitor.stories()) == 2

    visitor.page.once("dialog", lambda dialog: dialog.accept())
    visitor.button(f"Delete {READY}").click()
    expect(visitor.button(READY)).to_have_count(0)
    assert visitor.told() == second
    assert len(visitor.stories()) == 1


def test_an_answer_under_way_at_a_reload_is_kept_as_far_as_it_came(visitor: Visit) -> None:
    visitor.say(WALK)
    expect(visitor.page.locator(".turn.assistant[aria-busy] .words")).to_have_text(SOME_WORDS)
    visitor.page.reload()
    expect(visitor.answers.last).to_contain_text(re.compile("stopped|breaks off"))  # browsers hang up sooner or later
    assert visitor.told()[0] == WALK
    assert visitor.told()[1]
    visitor.page.get_by_role("button", name=re.compile("Try again|Regenerate")).click()
    expect(visitor.end()).not_to_contain_text("breaks off")
    assert len(visitor.told()) == 2


def test_a_story_deleted_while_it_is_told_does_not_come_back(visitor: Visit, server: Server) -> None:
    visitor.say(WALK)
    expect(visitor.page.locator(".turn.assistant[aria-busy] .words")).to_have_text(SOME_WORDS)
    visitor.page.once("dialog", lambda dialog: dialog.accept())
    visitor.button(f"Delete {WALK[:48]}").click()
    expect(visitor.page.locator(".scene").first).to_be_visible()
    visitor.until(lambda: figure(server.port, "vllm:num_requests_running") == 0)
    assert visitor.stories() == []


def test_sound_is_made_here(visitor: Visit) -> None:
    visitor.page.evaluate(LISTEN)

    def loudness() -> float:
        return float(visitor.page.evaluate("window.loudness()"))

    requests: list[str] = []
    visitor.page.on("request", lambda request: requests.append(request.url))
    visitor.button("Sound").click()
    expect(visitor.button("Sound")).to_have_attribute("aria-pressed", "true")
    visitor.until(lambda: loudness() > 0.01)
    loud = loudness()
    visitor.button("Sound").click()
    expect(visitor.button("Sound")).to_have_attribute("aria-pressed", "false")
    visitor.until(lambda: loudness() < loud / 4)
    assert [url for url in requests if not url.endswith("icon.svg")] == []
