"""The prologue: told while the model loads, and heard by it afterwards."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from playwright.sync_api import Browser, Response, expect

from model.tokenizer import Tokenizer
from tests.browser.slowed import slowed
from tests.browser.visit import Visit, visiting
from tests.conftest import ROOT
from tests.serving.server import Server, call, serving, wait_until_ready

Opened = Callable[..., Visit]
PROLOGUE = yaml.safe_load((ROOT / "cache_data/prologue.yaml").read_text(encoding="utf-8"))
PERSONA = yaml.safe_load((ROOT / "cache_data/persona.yaml").read_text(encoding="utf-8"))
SCENES = PROLOGUE["scenes"]
GREEDY = {"temperature": 0, "max_tokens": 24}


def test_it_is_told_while_the_model_loads_and_flows_on(chromium: Browser, embedded_build: Path) -> None:
    """The bar shows what /health/ready says, while scenes are told and choices made; nothing of it is lost then."""
    with slowed(embedded_build) as loading, visiting(chromium, loading.url) as visit:
        page = visit.page
        polled: list[Response] = []
        page.on("response", lambda response: polled.append(response))
        bar, first = page.get_by_role("progressbar"), page.locator(".scene").first
        page.goto(loading.url)
        loading.until(page, lambda: first.is_visible() and bar.is_visible() and 0 < shown(visit) < 1)
        halfway = shown(visit)

        first.click()  # tells the rest of the scene at once
        visit.button("A brass lantern").click()
        expect(page.locator(".scene")).to_have_count(2)
        page.locator(".scene").nth(1).click()
        expect(visit.button("Only my own shadow")).to_be_visible()
        assert visit.stories()[0]["choices"] == {"road": "lantern"}

        loading.run()
        expect(bar).to_be_hidden(timeout=60_000)
        expect(page.get_by_role("status")).to_contain_text("awake")
        expect(visit.button("A brass lantern")).to_have_attribute("aria-pressed", "true")
        states = [json.loads(one.text()) for one in polled if one.url.endswith("/health/ready")]
        assert halfway in [state["progress"] for state in states]
        assert [state["progress"] for state in states] == sorted(state["progress"] for state in states)
        assert states[-1]["status"] == "ready"

        visit.button("Only my own shadow").click()
        visit.begin()
        expect(visit.hear("I look about me.")).to_contain_text("Told by the model")
        assert visit.asked[-1]["emerald"]["choices"] == {"road": "lantern", "companion": "nobody"}


def test_what_the_licence_wants_seen_is_seen(chromium: Browser, embedded_build: Path, tmp_path: Path) -> None:
    """Of this engine, and of one whose manifest names Llama's licence."""
    llama = tmp_path / "build"
    shutil.copytree(embedded_build, llama, copy_function=os.link, ignore=shutil.ignore_patterns("int4", "trained"))
    manifest = json.loads((llama / "engine/manifest.json").read_text(encoding="utf-8"))
    (llama / "engine/manifest.json").unlink()
    (llama / "engine/manifest.json").write_text(json.dumps({**manifest, "licence": "llama3.1"}))
    for build, words in ((embedded_build, ""), (llama, "Built with Llama")):
        with serving(build) as server, visiting(chromium, server.url) as visit:
            wait_until_ready(server.port)
            visit.page.goto(server.url)
            expect(visit.page.locator("#model")).to_have_text(manifest["model_id"])
            expect(visit.page.locator("#badge")).to_have_text(words)


def test_a_ready_answer_comes_and_others_wait_while_the_model_loads(chromium: Browser, embedded_build: Path) -> None:
    with slowed(embedded_build) as loading, visiting(chromium, loading.url) as visit:
        page, status = visit.page, visit.page.get_by_role("status")
        page.goto(loading.url)
        loading.until(page, lambda: page.locator(".scene").first.is_visible())
        visit.begin()
        visit.say("I look about me.")
        loading.until(page, lambda: "still loading" in (status.text_content() or ""))
        expect(status).to_contain_text("asking again in 1 s")
        visit.button("Stop").click()
        expect(visit.button("Send")).to_be_visible()

        visit.say("Who is the Wizard?")
        loading.until(page, lambda: "Ready answer" in visit.answers.last.inner_text())
        expect(page.get_by_role("progressbar")).to_be_visible()

        visit.say("I look about me again.")
        loading.until(page, lambda: "still loading" in (status.text_content() or ""))
        loading.run()
        expect(visit.end()).to_contain_text("Told by the model")


def test_choices_reach_the_system_prompt(visit: Opened, server: Server, embedded_build: Path) -> None:
    """The request carries them; the prompt has the tokens of the author's sentences, no more; the story changes."""
    visitor = visit(reduced_motion="reduce")
    chosen = {scene["id"]: scene["choices"][-1] for scene in SCENES if "choices" in scene}
    for choice in chosen.values():
        visitor.button(choice["label"]).click()
    visitor.button("Begin the story").click()
    answer = visitor.hear("I step closer and open my bag.")
    body = visitor.asked[-1]
    assert body["emerald"]["choices"] == {scene: choice["id"] for scene, choice in chosen.items()}

    shapes = [choice["shapes"] for choice in chosen.values()]
    system = {"role": "system", "content": " ".join([PERSONA["system_prompt"].strip(), *shapes])}
    tokens = Tokenizer.load(embedded_build / "engine").encode_chat([system, *body["messages"]])
    assert visitor.figures(answer)["Prompt"].startswith(f"{len(tokens)} tokens")

    def told(choices: dict[str, str]) -> Any:
        shaped = {"messages": body["messages"], "emerald": {"choices": choices, "cache": False}, **GREEDY}
        return json.loads(call(server.port, "POST", "/v1/chat/completions", shaped)[2])

    shaped, plain = told(body["emerald"]["choices"]), told({})
    assert shaped["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    assert shaped["choices"][0]["message"]["content"] != plain["choices"][0]["message"]["content"]


def test_letters_come_one_by_one(visit: Opened) -> None:
    visitor = visit()
    scene = visitor.page.locator(".scene")
    unwritten = scene.locator(".unwritten")
    before = len(unwritten.inner_text())
    visitor.until(lambda: 0 < len(unwritten.inner_text()) < before - 5)
    assert scene.inner_text().strip() == SCENES[0]["text"].strip(), "a screen reader has all of it from the beginning"
    expect(visitor.button("A brass lantern")).to_have_count(0)
    scene.click()
    expect(unwritten).to_have_count(0)
    expect(visitor.button("A brass lantern")).to_be_visible()


def test_reduced_motion_tells_a_scene_at_once(visit: Opened) -> None:
    visitor = visit(reduced_motion="reduce")
    assert visitor.page.locator(".unwritten").count() == 0
    expect(visitor.button("A brass lantern")).to_be_visible()
    assert visitor.page.evaluate("document.getAnimations().length") == 0


def test_show_all_and_skip(visit: Opened) -> None:
    visitor = visit()
    visitor.button("Show all").click()
    expect(visitor.page.locator(".scene")).to_have_count(len(SCENES))
    expect(visitor.page.get_by_role("group")).to_have_count(1 + sum("choices" in scene for scene in SCENES))
    for scene, told in zip(SCENES, visitor.page.locator(".scene").all_inner_texts(), strict=True):
        assert told.startswith(scene["text"].strip())
    expect(visitor.button("Show all")).to_be_hidden()
    visitor.button("Begin the story").click()
    expect(visitor.answers).to_have_text([f"{PERSONA['name']}:{PERSONA['greeting']}"])
    expect(visitor.page.get_by_role("textbox")).to_be_focused()

    skipping = visit()
    skipping.begin()
    expect(skipping.page.locator(".scene")).to_be_hidden()
    expect(skipping.answers).to_have_count(1)


def test_the_road_stays_above_the_story_and_can_still_be_walked(visit: Opened) -> None:
    visitor = visit(reduced_motion="reduce")
    visitor.button("An old fiddle").click()
    visitor.page.reload()
    expect(visitor.button("An old fiddle")).to_have_attribute("aria-pressed", "true")
    visitor.begin()
    road = visitor.page.locator("#prologue summary")
    expect(road).to_contain_text("An old fiddle")
    visitor.hear("I play a tune.")
    visitor.page.reload()
    expect(road).to_contain_text("An old fiddle")
    road.click()
    visitor.button("A brass lantern").click()
    visitor.button("A talkative field mouse").click()
    visitor.hear("I look around.")
    assert visitor.asked[-1]["emerald"]["choices"] == {"road": "lantern", "companion": "mouse"}


def test_choices_that_the_author_has_withdrawn_are_left_out(visit: Opened) -> None:
    visitor = visit(reduced_motion="reduce")
    visitor.button("An old fiddle").click()
    visitor.page.evaluate(
        """() => {
          const key = Object.keys(localStorage).find((key) => key.startsWith("emerald.story."));
          const story = JSON.parse(localStorage[key]);
          story.choices = { road: "fiddle", companion: "dragon", harbour: "ship" };
          localStorage[key] = JSON.stringify(story);
        }"""
    )
    visitor.page.reload()
    visitor.begin()
    assert "Told by the model" in visitor.hear("I walk on.").inner_text()
    assert visitor.asked[-1]["emerald"]["choices"] == {"road": "fiddle"}


def shown(visit: Visit) -> float:
    """The value of the progress bar."""
    return float(visit.page.get_by_role("progressbar").evaluate("(bar) => bar.value"))
