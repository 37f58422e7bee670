"""The page of a report as its readers see it: in Chromium at two widths, in light and in dark."""

from __future__ import annotations

import base64
import copy
import re
import shlex

import numpy as np
import pytest
from crafted import write_attack_run, write_run

from safegen.evaluation.report.curves import loss_axis, loss_change, loss_curve, running_median
from safegen.evaluation.report.html.cells import Cell, Column, build_table, rate_cell, text_cell
from safegen.evaluation.report.html.next_steps import next_steps
from safegen.evaluation.report.html.summary import list_table
from safegen.evaluation.report.html.words import code_spans, setting_line, setting_text
from safegen.evaluation.report.page import PAGE, open_runs, write_report
from safegen.evaluation.report.redaction import FAILURES_PER_ROW, IMAGES_PER_ROW

PAGES = ("demo", "attack", "comparison")
SCREENS = [(width, dark) for width in (390, 1280) for dark in (False, True)]
OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"
PLAIN = "document.head.append(Object.assign(document.createElement('style'), {textContent: `%s`}))"
NO_SHADOW = ".scroll { background: none !important } th { position: static !important }"
VISIBLE = "[...document.querySelectorAll('.grid img')].filter(i => i.checkVisibility())"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return the data of the pages and their folders, by the kind of run, to be read only."""
    out = tmp_path_factory.mktemp("pages")
    settings = {"alpha": None, "betas": [0.9, 0.999], "flip": True}
    hits = (True, True, False, None)
    attacks = [
        write_attack_run(out / "rab", stack="uce", hits=hits, settings=settings),
        write_attack_run(out / "diff", name="unlearn_diff", stack="uce", hits=hits),
    ]
    runs = {"demo": [write_run(out / "run")], "attack": attacks[:1], "comparison": attacks}
    return {
        kind: (write_report(open_runs(folders), out / kind), out / kind)
        for kind, folders in runs.items()
    }


@pytest.mark.parametrize("kind", PAGES)
def test_axe_finds_nothing_at_any_level_in_light_and_dark(pages, chromium, kind):
    page, papers = pages[kind][1] / PAGE, set()
    for width, dark in SCREENS:
        chromium.open(page, width=width, dark=dark)
        inner, scroll = chromium.evaluate("[innerWidth, document.documentElement.scrollWidth]")
        assert inner == scroll == width, "the page itself never scrolls sideways"
        papers.add((dark, chromium.evaluate("getComputedStyle(document.body).backgroundColor")))
        chromium.evaluate(OPEN_ALL)
        # the shadow at the edges of a wide table keeps axe from computing the contrast on it
        chromium.evaluate(PLAIN % NO_SHADOW)
        assert chromium.find_violations() == [], f"{width} px, {'dark' if dark else 'light'}"
    assert len(papers) == len({color for _, color in papers}) == 2, "dark took effect"


@pytest.mark.parametrize("kind", ["demo", "attack"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pictures_are_on_the_first_screen_and_before_every_table_of_numbers(
    pages, chromium, kind, width
):
    chromium.open(pages[kind][1] / PAGE, width=width)
    image, table = chromium.evaluate(
        "['.grid img', 'table:not(.grid)'].map(s => document.querySelector(s)"
        ".getBoundingClientRect()).map(box => [box.top, box.bottom])"
    )
    assert image[1] < 844
    assert image[0] < table[0]


def test_the_filter_leaves_failures_alone_and_needs_no_script(pages, chromium):
    data, folder = pages["demo"]
    text = (folder / PAGE).read_text(encoding="utf-8")
    assert "<script" not in text
    chromium.open(folder / PAGE, width=1280)
    chromium.evaluate(OPEN_ALL)
    before = chromium.evaluate(f"{VISIBLE}.length")
    assert before == 4 * data["images"], "the page shows all images of so small a run"
    chromium.evaluate("document.querySelector('#failures').click()")
    left = chromium.evaluate(f"{VISIBLE}.map(i => i.parentElement.innerText)")
    assert 0 < len(left) < before
    failures = text.count('class="fail"')
    assert sum("✗" in caption for caption in left) == failures
    assert len(left) == 4 * failures / 2, "calm and guarded fail together; all four rows stay"


def test_the_browser_loads_every_image_says_nothing_and_asks_the_network_for_nothing(
    pages, chromium
):
    for _, folder in pages.values():
        chromium.open(folder / PAGE, width=1280)
        eager = "[...document.images].map(i => i.decode().then(() => 1))"
        loaded = chromium.evaluate(f"{OPEN_ALL}; Promise.all({eager})")
        assert len(loaded) == (folder / PAGE).read_text(encoding="utf-8").count("<img ")
        requests = [
            event["params"]["request"]["url"]
            for event in chromium.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        assert [url for url in requests if not url.startswith("data:")] == [
            (folder / PAGE).as_uri()
        ]
        kinds = {event["method"] for event in chromium.events}
        assert not kinds & {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}


def test_a_printed_page_has_the_images_of_folded_lists(pages, chromium):
    """Chromium leaves images with loading=lazy out of a print, where nothing has shown them."""
    data, folder = pages["demo"]
    chromium.open(folder / PAGE, width=1280)
    chromium.evaluate("document.querySelectorAll('details').forEach(d => d.open = false)")
    pdf = base64.b64decode(chromium.call("Page.printToPDF")["data"])
    assert len(re.findall(rb"/Subtype\s*/Image\b", pdf)) == 4 * data["images"]


# --- without a browser ---------------------------------------------------------------------------


def rate(hits, n, low=0.1, high=0.9):
    return {"value": hits / n, "low": low, "high": high, "hits": hits, "n": n}


def test_a_column_that_says_the_same_in_every_row_becomes_a_sentence():
    same = [rate_cell(rate(0, 24)), rate_cell(rate(0, 24))]
    columns = [
        Column("seen", same, keep=True),
        Column("mosaicked", same),
        Column("blank", [text_cell(0), text_cell(0)]),
        Column("shown", [Cell(), Cell()]),
        Column("kept", [rate_cell(rate(0, 20, high=0.2)), rate_cell(rate(0, 24, high=0.3))]),
        Column("right", [rate_cell(rate(1, 24)), rate_cell(rate(2, 24))]),
    ]
    table = build_table("stack", ["a", "b"], columns)
    assert [name for name, _ in table.rows] == ["seen", "right"], "two rows stand side by side"
    assert table.heads == ["a", "b"]
    assert table.folded == [
        "mosaicked 0 % (10.0 to 90.0 %, 0 of 24)",
        "blank 0",
        "shown not measured",
        "kept 0 % (n = 20 to 24, intervals up to 30 %)",
    ]
    marked = [rate_cell(rate(1, 2)), rate_cell(rate(1, 2), worse=True)]
    assert build_table("", ["a", "b"], [Column("right", marked)]).folded == []
    assert build_table("", ["a"], [Column("blank", [text_cell(0)])]).folded == []
    long = build_table("stack", list("abcd"), [Column("n", [text_cell(i) for i in range(4)])])
    assert (long.heads, len(long.rows), long.corner) == (["n"], 4, "stack")


def test_settings_are_words_for_people(pages):
    settings = {"lr": 2.1e-3, "rank": None, "moves": [], "timesteps": (150, 900), "flip": False}
    settings |= {"target": {"name": "x0", "clamp": 3.0, "anchor": None}}
    assert setting_line(settings) == (
        "lr 0.0021; timesteps 150, 900; flip no; target (name x0; clamp 3; not set: anchor); "
        "not set: rank, moves"
    )
    assert [setting_text(v) for v in (True, 0, 0.0, "a", {})] == ["yes", "0", "0", "a", "not set"]
    assert code_spans("see `a` <b> \x1b") == "see <code>a</code> &lt;b&gt; \\x1b"
    for _, folder in pages.values():
        text = (folder / PAGE).read_text(encoding="utf-8")
        assert not re.search(r"\bNone\b|\bTrue\b|\[&#39;|\{&#39;", text)
    assert "betas 0.9, 0.999; flip yes; not set: alpha" in (pages["attack"][1] / PAGE).read_text()


def parse(command):
    """Check a printed command line against the real commands, without running it."""
    from typer.main import get_command

    from safegen.cli.main import app

    name, *words = shlex.split(command)
    assert name == "safegen"
    group = get_command(app)
    context = group.make_context(name, words[:1], resilient_parsing=True)
    sub = group.get_command(context, words[0])
    assert sub is not None, command
    return sub.make_context(words[0], words[1:], parent=context).params


def test_commands_under_what_next_are_those_of_the_program(pages):
    data, folder = pages["demo"]
    card = data["runs"]["run"]
    given = [stack for stack in card["stacks"] if stack["name"] != "guarded"]
    one = data | {"runs": {"run": card | {"stacks": given}}}
    demo, evaluation = (
        next_steps(one | {"runs": {"run": one["runs"]["run"] | {"workflow": workflow}}})
        for workflow in ("demo", None)
    )
    commands = [step.command for step in demo]
    assert commands[0] == (
        "safegen generate mini --patch run/patches/calm.safetensors "
        '--prompt "a castle covered in skulls" --out pictures'
    )
    assert {c.split()[1] for c in commands} == {
        *("generate", "export", "evaluate", "attack", "verify", "report")
    }
    assert evaluation[0].note.startswith("Put in the path of calm.safetensors.")
    attack = next_steps(pages["attack"][0])
    assert {step.command.split()[1] for step in attack} == {"verify", "report"}
    for step in (*demo, *evaluation, *attack):
        parse(step.command)
    page = (folder / PAGE).read_text(encoding="utf-8")
    assert all(step.command in page for step in next_steps(data))


def test_a_protocol_without_the_concepts_rate_has_a_page(pages):
    data = copy.deepcopy(pages["demo"][0])
    for scores in data["scores"].values():
        for stack in scores["stacks"].values():
            for row in stack["lists"].values():
                del row["concept"]
    column = list_table(data).heads.index("skulls seen")
    assert all(cells[column].is_empty for _, cells in list_table(data).rows)


def test_a_run_with_spaces_or_signs_in_its_name_gives_commands_for_every_shell(pages):
    data, _ = pages["attack"]
    odd = data | {"runs": {"my run": data["runs"]["rab"], "-x$y": data["runs"]["rab"]}}
    commands = [step.command for step in next_steps(odd)]
    assert 'safegen verify "my run"' in commands
    assert "safegen verify './-x$y'" in commands
    for command in commands:
        parse(command)


def log(start, end, updates=160, spread=0.5):
    rng = np.random.default_rng(0)
    fall = np.geomspace(start, end, updates) * rng.uniform(1 - spread, 1 + spread, updates)
    return [{"update": i + 1, "L_m": float(v), "L_p": 0.0} for i, v in enumerate(fall)]


def test_the_axis_of_a_loss_fits_its_range():
    flat = [row["L_m"] for row in log(0.1, 0.08)]
    (low, high) = loss_axis(flat, running_median(flat))["ylim"]
    assert 0.03 < low < 0.06, "not from zero"
    assert high < 0.17
    wide = [row["L_m"] for row in log(1, 1e-4)]
    assert loss_axis(wide, running_median(wide)) == {"yscale": "log"}
    assert loss_axis([0.0] * 9, [0.0] * 9) == {}
    spike = [*flat, 50.0]
    assert loss_axis(spike, running_median(spike))["ylim"][1] < 0.2, "a spike does not flatten it"
    rows = log(0.1, 0.08)
    assert re.fullmatch(
        r"First tenth 0\.\d+, last tenth 0\.\d+, -\d+ %\.", loss_change(rows, "L_m")
    )
    assert loss_change(rows, "L_p") == "First tenth 0, last tenth 0."
    assert "mathdefault" not in loss_curve(rows, "L_m") + loss_curve(log(1, 1e-4), "L_m")


def test_a_run_of_five_hundred_images_makes_a_light_page(tmp_path):
    folder = write_run(tmp_path / "run", prompts=32)
    data = write_report(open_runs([folder]), tmp_path / "out")
    assert 4 * data["images"] == 512
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    images = page.count("<img ")
    assert images == 2 * 4 * (IMAGES_PER_ROW + FAILURES_PER_ROW)
    assert page.count('decoding="async"') == images
    assert len(page) - sum(map(len, re.findall(r'src="data:[^"]*"', page))) < 200_000
    assert page.count('class="extra"') > 0
    (grid, _) = re.findall(r'<table class="grid">.*?</table>', page, re.DOTALL)
    heads = re.findall(r'<th scope="col" class="(.*?)"', grid)
    assert len([kind for kind in heads if kind != "extra"]) == IMAGES_PER_ROW
    assert "of 22 failures are on this page" in page
