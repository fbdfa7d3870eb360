"""For everyone: by keyboard alone, on a phone, in the dark, and as axe and a screen reader see it."""

from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.browser.slowed import by_moments
from tests.browser.test_inert import answers
from tests.browser.visit import PHONE, Visit
from tests.serving.server import Server

Opened = Callable[..., Visit]
LIKE = "Could you tell me who the Wizard is, please?"
WIDE = (
    "A" * 300
    + "\n\n```\n"
    + "wide " * 100
    + "\n```\n\n"
    + "| column |" * 12
    + "\n"
    + "|---|" * 12
    + "\n"
    + "| some longer text |" * 12
)
OVERFLOW = "document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [{}, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_serious(visit: Opened, scheme: str, device: dict[str, object]) -> None:
    visitor = visit(color_scheme=scheme, reduced_motion="reduce", **device)
    assert visitor.accessibility_faults() == [], "prologue"
    visitor.button("Show all").click()
    visitor.button("A brass lantern").click()
    assert visitor.accessibility_faults() == [], "whole prologue"
    visitor.button("Begin the story").click()
    visitor.figures(visitor.hear(LIKE))
    visitor.figures(visitor.hear("I look up at the towers."))
    assert visitor.accessibility_faults() == [], "answers with their figures"
    visitor.page.locator("#prologue summary").click()
    visitor.button("Edit").first.click()
    assert visitor.accessibility_faults() == [], "open road, open editor"
    if device:
        visitor.button("Stories").click()
        assert visitor.accessibility_faults() == [], "open shelf"


def test_the_whole_way_by_keyboard(visit: Opened, server: Server) -> None:
    visitor = visit(reduced_motion="reduce")
    keyboard = visitor.page.keyboard
    assert walk(visitor, 5) == ["Skip to the message box", "Export", "Sound", "Dark", "New story"]
    assert walk(visitor, 4) == ["HTTP interface", "The story", "The Road to the Emerald City", "A brass lantern"]
    keyboard.press("Enter")
    expect(visitor.button("A brass lantern")).to_be_focused()
    assert walk(visitor, 3) == ["An old fiddle", "A basket of bread and plums", "A talkative field mouse"]
    keyboard.press("Space")
    assert walk(visitor, 7)[2:] == [
        "The way home",
        "A friend who went ahead",
        "Everything there is to see",
        "Show all",
        "Skip the prologue",
    ]
    keyboard.press("Enter")
    expect(visitor.page.get_by_role("textbox")).to_be_focused()
    keyboard.type("Who is the")
    keyboard.press("Shift+Enter")
    keyboard.type("Wizard?")
    keyboard.press("Enter")
    expect(visitor.end()).to_contain_text("Ready answer")
    expect(visitor.page.get_by_role("textbox")).to_be_focused()
    assert visitor.told()[0] == "Who is the\nWizard?"
    assert walk(visitor, 4, "Shift+Tab") == ["Regenerate", "Copy", "details", "Edit"]
    assert walk(visitor, 3) == ["details", "Copy", "Regenerate"]
    with by_moments(server):
        keyboard.press("Enter")
        expect(visitor.page.locator(".turn[aria-busy]")).to_be_focused()
    visitor.end()
    expect(visitor.answers.last).to_be_focused()
    assert walk(visitor, 2) == ["details", "Copy"]
    keyboard.press("Shift+Tab")
    keyboard.press("Enter")
    expect(visitor.answers.last.locator("dl")).to_be_visible()


def test_the_skip_link_leads_to_the_message_box(visit: Opened) -> None:
    visitor = visit()
    visitor.page.keyboard.press("Tab")
    link = visitor.page.get_by_role("link", name="Skip to the message box")
    expect(link).to_be_in_viewport()
    visitor.page.keyboard.press("Enter")
    expect(visitor.page.get_by_role("textbox")).to_be_focused()


def test_a_screen_reader_hears_scenes_and_answers_once_and_whole(visit: Opened) -> None:
    visitor = visit()
    log, status = visitor.page.get_by_role("log"), visitor.page.get_by_role("status")
    visitor.page.locator(".scene").click()
    visitor.button("A brass lantern").click()
    expect(log).to_contain_text("By mid-morning the farm is a green speck behind you.")
    expect(log).to_contain_text("Who has been waiting there to walk with you?")
    visitor.begin()
    answers(visitor, "It is **green**.")
    visitor.hear("What colour is it?")
    expect(log).to_have_text("It is green.")
    expect(status).to_have_text("")
    live = visitor.page.locator("[aria-live], [role=log], [role=status], [role=alert]")
    assert live.evaluate_all("(all) => all.map((one) => one.id)") == ["status", "spoken"]


def test_on_a_phone_nothing_is_wider_than_the_screen(visit: Opened) -> None:
    visitor = visit(**PHONE, reduced_motion="reduce")
    overflow = [visitor.page.evaluate(OVERFLOW)]
    visitor.button("Show all").tap()
    overflow.append(visitor.page.evaluate(OVERFLOW))
    visitor.button("Begin the story").tap()
    visitor.figures(visitor.hear(LIKE))
    overflow.append(visitor.page.evaluate(OVERFLOW))
    answers(visitor, WIDE)
    visitor.hear("W" * 200)
    overflow.append(visitor.page.evaluate(OVERFLOW))
    assert visitor.page.locator("#scroll").evaluate("(story) => story.scrollWidth - story.clientWidth") == 0
    visitor.button("Edit").last.tap()
    visitor.button("Stories").tap()
    expect(visitor.button("New story")).to_be_in_viewport()
    overflow.append(visitor.page.evaluate(OVERFLOW))
    assert overflow == [0] * 5
    too_small = visitor.page.get_by_role("button").evaluate_all(
        """(all) => all.filter((one) => one.checkVisibility())
          .map((one) => [one.textContent, one.getBoundingClientRect()])
          .filter(([, {width, height}]) => width < 24 || height < 24).map(([name]) => name)"""
    )
    assert too_small == []
    visitor.page.keyboard.press("Escape")
    expect(visitor.button("New story")).to_be_hidden()
    expect(visitor.button("Stories")).to_be_focused()


def test_dark_follows_the_system_until_the_visitor_chooses(visit: Opened) -> None:
    visitor = visit(color_scheme="dark")
    assert lightness(visitor) < 50
    expect(visitor.button("Dark")).to_have_attribute("aria-pressed", "true")
    visitor.page.emulate_media(color_scheme="light")
    assert lightness(visitor) > 200
    visitor.button("Dark").click()
    assert lightness(visitor) < 50
    visitor.page.reload()
    visitor.page.locator(".scene").first.wait_for()
    assert lightness(visitor) < 50
    visitor.button("Dark").click()
    assert lightness(visitor) > 200


def walk(visitor: Visit, steps: int, key: str = "Tab") -> list[str]:
    """The names of what the key leads to."""
    names = []
    for _ in range(steps):
        visitor.page.keyboard.press(key)
        names.append(
            visitor.page.evaluate(
                """() => {
                  const one = document.activeElement;
                  const heading = one.querySelector("h2");
                  if (one.matches(".origin summary")) return "details";
                  return one.ariaLabel ?? (heading ?? one).textContent.trim();
                }"""
            )
        )
    return names


def lightness(visitor: Visit) -> int:
    """Of the page's ground, 0 to 255."""
    colour = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    return int(colour.removeprefix("rgb(").partition(",")[0])
