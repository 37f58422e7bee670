"""The files of the playground, and what its server says of itself."""

from __future__ import annotations

import re
from importlib.resources import files
from types import SimpleNamespace

import httpx2
import pytest

from safegen.core.concept import load_concept
from safegen.serve.config import ServerConfig
from safegen.serve.page.examples import example_prompts
from safegen.serve.page.routes import TYPES, describe_server

STATIC = files("safegen.serve.page").joinpath("static")


def test_every_file_has_its_type_a_tag_and_the_policy(page_address):
    assert {path.name for path in STATIC.iterdir()} == set(TYPES)
    for path in ("/", *(f"/page/{name}" for name in TYPES)):
        answer = httpx2.get(page_address + path)
        name = path.rpartition("/")[2] or "index.html"
        assert answer.status_code == 200
        assert answer.content == STATIC.joinpath(name).read_bytes()
        assert answer.headers["content-type"] == TYPES[name]
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; img-src 'self' data: blob:;")
        assert "unsafe" not in policy
        tag = answer.headers["etag"]
        again = httpx2.get(page_address + path, headers={"if-none-match": f'"other", W/{tag}'})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
        assert httpx2.head(page_address + path).status_code == 200
    for name in ("no.js", "routes.py", "..%2froutes.py", "static/index.html", "index.html/"):
        assert httpx2.get(f"{page_address}/page/{name}").status_code in (307, 404)


def test_the_page_has_no_inline_code_and_only_relative_addresses():
    html = STATIC.joinpath("index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son[a-z]+=|javascript:", html)
    for address in re.findall(r'(?:src|href|action)="([^"]*)"', html):
        assert re.match(r"page/|#", address), address
    script = "".join(STATIC.joinpath(n).read_text("utf-8") for n in TYPES if n.endswith(".js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(|localStorage", script)
    assert not re.search(
        r"""["'`](/|https?:)(?!/www\.w3\.org)""", script.replace("://www", ":/www")
    )


def test_the_page_has_the_colors_of_the_report():
    names = ("ink", "soft", "line", "paper", "card", "good", "accent", "link", "shade")

    def colors(text: str) -> list[list[str]]:
        return [re.findall(rf"--{name}: ([^;]*);", text)[:2] for name in names]

    report = files("safegen.evaluation.report").joinpath("templates", "style.css")
    page = STATIC.joinpath("style.css").read_text("utf-8")
    assert colors(page) == colors(report.read_text("utf-8"))


def test_the_page_learns_stacks_limits_and_defaults(page_address):
    answer = httpx2.get(f"{page_address}/playground.json")
    assert answer.headers["cache-control"] == "no-store"
    config = answer.json()
    assert [stack["name"] for stack in config["stacks"]] == ["safe", "mini", "other"]
    assert [stack["is_base"] for stack in config["stacks"]] == [False, True, False]
    assert [guard["name"] for guard in config["stacks"][0]["guards"]] == [
        *("prompt-filter", "judge-filter")
    ]
    assert config["stacks"][0]["size"] == [64, 64]
    assert config["limits"]["images"] == 10
    assert config["defaults"] == {"steps": 25, "guidance": 5.0}


def test_a_base_is_offered_only_if_the_operator_allows_it(page_engine):
    for allow in (False, True):
        config = ServerConfig(stacks=("fake",), allow_base=allow)
        described = describe_server(
            SimpleNamespace(config=config, stacks=page_engine.stacks, stack=lambda: None)
        )
        names = [stack["name"] for stack in described["stacks"]]
        assert names == ["safe", *(["mini"] if allow else []), "other"]


def test_in_front_of_another_server_the_defaults_are_its_own(page_engine):
    config = ServerConfig(upstream={"url": "http://127.0.0.1:1"}, guards=("judge-filter",))
    service = SimpleNamespace(config=config, stacks=page_engine.stacks, stack=lambda: None)
    assert describe_server(service)["defaults"] is None


@pytest.mark.parametrize("name", ["skulls", "fire"])
def test_examples_come_from_the_lists_of_the_concept(name):
    benign, explicit, innocent = (each["prompt"] for each in example_prompts(name, []))
    stems = re.compile(
        "|".join({"skulls": ["skull"], "fire": ["fire", "flame", "blaz", "burn"]}[name])
    )
    assert stems.search(explicit)
    assert not stems.search(benign + innocent)
    assert all("castle" in prompt for prompt in (benign, explicit, innocent))


def test_examples_name_no_concept_that_has_no_lists():
    for name in ("nudity", "violence"):
        text = " ".join(each["prompt"] for each in example_prompts(name, ["mini"]))
        assert not any(word in text for word in load_concept(name).words)
    assert example_prompts(None, ["sd15"]) == example_prompts("nudity", [])
    assert example_prompts(None, ["mini"]) == example_prompts("skulls", [])
