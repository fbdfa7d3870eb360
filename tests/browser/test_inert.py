"""An answer full of tags and tricks stays text: nothing in it runs, loads, submits or leads astray.

The small model will not say these things when asked to, so the stream is made up here; it comes through the same door.
"""

import json
from collections.abc import Callable

import pytest
from playwright.sync_api import Route, expect

from tests.browser.visit import Visit

Opened = Callable[..., Visit]
ALARM = "window.reached = true; alert(1); document.title = 'taken'"
ATTACKS = [
    f"<script>{ALARM}</script>",
    f'<img src=x onerror="{ALARM}"> and ![picture](https://elsewhere.test/pixel.png)',
    f'<svg onload="{ALARM}"><script>{ALARM}</script></svg>',
    f'<math><mi xlink:href="javascript:{ALARM}">x</mi></math>',
    '<iframe src="javascript:alert(1)" srcdoc="<script>parent.reached = true</script>"></iframe>',
    '<object data="https://elsewhere.test/o"></object><embed src="https://elsewhere.test/e">',
    '<form action="https://elsewhere.test/"><input autofocus onfocus="alert(1)"><button>Send</button></form>',
    f'<details open ontoggle="{ALARM}"><summary>x</summary></details>',
    f'<a href="javascript:{ALARM}">tag</a> [link](javascript:alert(1)) [odd](  jAvAsCrIpT:alert(1))',
    "[entity](javascript&#58;alert(1)) [tab](java\tscript:alert(1)) <javascript:alert(1)>",
    "[data](data:text/html,<script>alert(1)</script>) [vb](vbscript:x) [file](file:///etc/passwd) [here](/docs)",
    '[title](https://elsewhere.test "x" onmouseover="alert(1)")',
    f"[ref]\n\n[ref]: javascript:alert(1) 'x'\n\n`<img src=x onerror=\"{ALARM}\">`",
    f'```html"><script>{ALARM}</script>\n</code></pre><script>{ALARM}</script>\n```',
    "<style>body { display: none }</style><link rel=stylesheet href=https://elsewhere.test/s.css><base href=//x.test>",
    '<meta http-equiv=refresh content="0;url=https://elsewhere.test/"><video src=https://elsewhere.test/v autoplay>',
    f'<div id=message name=body style="position: fixed; inset: 0" onclick="{ALARM}">over the page</div>',
    f"<noscript><p title=\"</noscript><img src=x onerror='{ALARM}'>\"></noscript>",
    f'<table><tr><td background="javascript:{ALARM}">',
    "| a <img src=x onerror=alert(1)> | b |\n|---|---|\n| <b>1</b> | 2 |",
    f"<![CDATA[<script>{ALARM}</script>]]><!--><img src=x onerror='{ALARM}'>-->",
    f"<custom-tag><template><img src=x onerror='{ALARM}'></template></custom-tag><p slot=x is=x>",
]
FORBIDDEN = (
    "script, style, link, meta, base, img, picture, svg, math, iframe, object, embed, video, audio, source, form, "
    "input, select, template, details details, marquee, dialog, slot, [style], [id], [name], [class], [is]"
)


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "all at once"])
def test_tags_and_tricks_stay_inert(visit: Opened, together: bool) -> None:
    visitor = visit()
    visitor.begin()
    title = visitor.page.title()
    for attack in ["\n\n".join(ATTACKS)] if together else ATTACKS:
        answers(visitor, attack)
        visitor.hear("Say it.")
    visitor.page.reload()
    visitor.answers.last.wait_for()  # what was kept is drawn by the same path
    words = visitor.page.locator(".turn.assistant .words")
    assert words.locator(FORBIDDEN).count() == 0
    attributes = words.evaluate_all(
        "(all) => all.flatMap((one) => [...one.querySelectorAll('*')].flatMap((inner) => inner.getAttributeNames()))"
    )
    assert set(attributes) <= {"href", "target", "rel", "start"}
    links = words.get_by_role("link").evaluate_all("(all) => all.map((link) => [link.href, link.target, link.rel])")
    assert {href.partition(":")[0] for href, _, _ in links} <= {"https"}
    assert all(target == "_blank" and "noopener" in rel for _, target, rel in links)
    for link in words.get_by_role("link").all():
        link.hover()
    assert visitor.page.evaluate("window.reached") is None
    assert visitor.page.title() == title
    expect(visitor.page.get_by_role("textbox")).to_be_visible()
    shown = "\n".join(words.all_inner_texts())
    assert "<script>" in shown, "a tag is shown as the text that it is"
    assert "[image: picture]" in shown


def test_markdown_is_rendered(visit: Opened) -> None:
    visitor = visit()
    visitor.begin()
    answers(
        visitor,
        "# Title\n\nA **bold** and *slanted* word, `code`, ~~gone~~ and [a link](https://example.org).\n\n"
        "- one\n- two\n\n3. three\n\n> said\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```\nkeep  spaces\n```\n\n---\n",
    )
    words = visitor.hear("Show me.").locator(".words")
    for tag, text in {
        "h3": "Title",
        "strong": "bold",
        "em": "slanted",
        "p code": "code",
        "del": "gone",
        "a": "a link",
        "ul > li:first-child": "one",
        "ol[start='3'] > li": "three",
        "blockquote": "said",
        "tbody td:first-child": "1",
        "pre": "keep  spaces",
    }.items():
        assert words.locator(tag).inner_text().strip() == text
    assert words.locator("hr").count() == 1
    assert visitor.accessibility_faults() == []


def test_a_text_that_no_parser_can_read_is_shown_as_it_came(visit: Opened) -> None:
    visitor = visit()
    visitor.begin()
    nested = "> " * 20_000 + "the bottom"
    answers(visitor, nested)
    expect(visitor.hear("Dig.").locator(".words")).to_contain_text("the bottom")
    expect(visitor.button("Regenerate")).to_be_visible()


def test_what_the_visitor_writes_is_text(visit: Opened) -> None:
    visitor = visit()
    visitor.begin()
    said = f'<img src=x onerror="{ALARM}"> **not bold**'
    visitor.hear(said)
    assert visitor.told()[0] == said
    assert visitor.page.evaluate("window.reached") is None


def answers(visitor: Visit, text: str) -> None:
    """From now on the server seems to say this, in pieces of a few letters."""
    pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    headers = {"Content-Type": "text/event-stream", "X-Emerald-Source": "model", "X-Emerald-Miss": "made up"}

    def fulfil(route: Route) -> None:
        route.fulfill(status=200, headers=headers, body=body)

    visitor.page.unroute("**/v1/chat/completions")
    visitor.page.route("**/v1/chat/completions", fulfil)
