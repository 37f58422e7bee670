"""Names, prompts and provenance stand as text on the page, in the table and in the card."""

from __future__ import annotations

import unicodedata
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from safegen.evaluation.report.format import markdown_code, markdown_text

HOSTILE = (
    '\x1b]0;x\x07[red]<script>alert(1)</script></details><img src=x onerror="y">'
    "|`**b**`\n# h\n\n---\n\u202e~~~![i](http://a)&lt;"
)


class Tags(HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.opened, self.closed, self.attributes, self.text = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.opened.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        self.closed.append(tag)

    def handle_data(self, data):
        self.text += data


def controls(text):
    """Return the characters that control a terminal or the direction of text."""
    bad = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return {c for c in text if unicodedata.category(c) in bad and c != "\n"}


def rendered(text):
    """Return the tags of Markdown text, with HTML allowed and tables on."""
    return Tags(
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)
    )


@pytest.mark.parametrize(
    "text", [HOSTILE, "# a", "1. a", "- a", "+ a", "---", "===", "12) a", "~~a~~"]
)
def test_markdown_text_is_shown_as_it_is(text):
    page = rendered(f"{markdown_text(text)}\n\nnext")
    assert page.opened == ["p", "p"]
    shown = " ".join(text.split()).replace("\x1b", "\\x1b").replace("\x07", "\\x07")
    assert page.text.split("\nnext")[0].strip() == shown.replace("\u202e", "\\u202e")


def test_figures_need_no_escape():
    for figure in ("-3.2", "12.5 % (1 to 2 %; n = 3)", "+1.0 (-2 to 3)", "0.12 (n = 3, 4)", "–"):
        assert markdown_text(figure) == figure


def test_markdown_code_stays_in_its_cell():
    table = f"| a | b |\n|---|---|\n| {markdown_code(HOSTILE)} | {markdown_text(HOSTILE)} |\n"
    page = rendered(table)
    assert page.opened == [*("table", "thead", "tr", "th", "th", "tbody", "tr", "td", "code", "td")]
    assert page.text.count("<script>alert(1)</script>") == 2


def test_a_model_card_holds_provenance_as_text():
    from safegen.evaluation.report.model_card import CardSubject, model_card

    digest = "0" * 64
    settings = {"erase": [HOSTILE], "debias": {HOSTILE: 1}, HOSTILE: HOSTILE}
    metadata = {
        "method": HOSTILE,
        "settings": settings,
        "description": HOSTILE,
        "data": HOSTILE,
        "parents": [{"method": HOSTILE, "hash": digest}],
        "metrics": [{"about": HOSTILE, "lists": {HOSTILE: {"removal": None, "this": {}}}}],
        "parts": [{"hash": digest, "metadata": {"method": HOSTILE}}],
    }
    subject = CardSubject("patch", HOSTILE, HOSTILE, digest, [(digest, metadata)], [HOSTILE])
    text = model_card(subject)
    assert controls(text) == set()
    page = rendered(text.split("---\n", 2)[2])
    assert {"script", "img", "details", "a", "s"}.isdisjoint({*page.opened, *page.closed})
    assert page.opened.count("h1") == 1
    assert page.opened.count("h2") == 5
    assert page.opened.count("h3") == 2
    assert page.text.count("<script>alert(1)</script>") >= 8


def test_a_card_of_strange_settings_is_written():
    from safegen.evaluation.report.model_card import CardSubject, model_card

    for settings in ({"erase": 5}, {"erase": {"a": 1}}, {"erase": [1, None], "debias": [1]}):
        metadata = {"method": "uce", "settings": settings}
        assert "uce" in model_card(CardSubject("patch", "p", None, None, [("0" * 64, metadata)]))


def test_the_page_and_the_table_hold_every_text_of_a_run_as_text(finished):
    from safegen.evaluation.report.data import report_data
    from safegen.evaluation.report.page import markdown, open_runs, render
    from safegen.evaluation.report.redaction import image_grids

    runs = open_runs([finished])
    data, results = report_data(runs)
    data["revealed"] = False
    grids = image_grids(runs, results, reveal=False)
    clean, looked_up = Tags(render(data, grids)), {"kind", "role", "run", "name", "seeds", "uri"}

    def spoil(value, key=""):
        if isinstance(value, dict):
            return {k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [spoil(v, key) for v in value]
        return value + HOSTILE if isinstance(value, str) and key not in looked_up else value

    hostile, grids = spoil(data), spoil(grids)
    hostile["protocol"]["decides"] = data["protocol"]["decides"]
    hostile["protocol"]["name"] += HOSTILE
    for part, grid in zip(hostile["lists"], grids, strict=True):
        scores = next(iter(hostile["scores"].values()))["stacks"].values()
        for stack in scores:
            stack["lists"][part["name"] + HOSTILE] = stack["lists"].pop(part["name"])
        part["name"] += HOSTILE
        grid["list"] += HOSTILE
    text = render(hostile, grids)
    assert [line for line in text.split("\n") if controls(line)] == []
    page = Tags(text)
    assert page.opened.count("script") == 0
    assert page.opened.count("img") == clean.opened.count("img")
    assert page.opened.count("details") == page.closed.count("details")
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 50
    table = rendered(markdown(hostile))
    assert controls(markdown(hostile)) == set()
    assert {"script", "img", "a", "h1"}.isdisjoint(table.opened)
