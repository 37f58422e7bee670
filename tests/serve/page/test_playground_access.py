"""The playground of servers with tokens, behind a path prefix, and while they start."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from safegen.serve.app import build_app
from safegen.serve.config import ServerConfig

TOKEN = "a-token-of-the-tests-0123456789"


@pytest.fixture
def tokens(fakes, tmp_path):
    """Yield the address of a server that needs a token."""
    path = tmp_path / "tokens.toml"
    path.write_text(f'[alice]\ntoken = "{TOKEN}"\n', encoding="utf-8")
    path.chmod(0o600)
    with fakes.serving(ServerConfig(stacks=("fake",), token_file=path), fakes.FakeEngine()) as url:
        yield url


def test_a_server_with_tokens_asks_for_one_and_the_tab_remembers_it(tokens, make_playground):
    page = make_playground(tokens)
    page.open(ready=False)
    page.wait("document.activeElement.id === 'token'")
    assert page.browser.find_violations() == []
    assert page.text("#status") == "This server asks for a token."
    assert page.value("document.querySelectorAll('#stack option').length") == 0, "it says nothing"
    page.type("a-wrong-token-0123456789")
    page.press("Enter")
    page.wait("document.querySelector('#token-note').innerText.includes('refused')")
    assert page.focus() == "token"
    page.type(TOKEN)
    page.press("Enter")
    page.wait("document.querySelector('.example')")
    assert (page.count("#token-form"), page.focus()) == (0, "prompt")
    page.generate("a castle")
    assert page.count("#current img") == 1
    kept = "[localStorage.length, document.cookie, location.href.includes('token')]"
    assert page.value(kept) == [0, "", False]
    assert page.value("sessionStorage.getItem('safegen-token')") == TOKEN
    page.open()
    page.generate("a castle")
    assert page.count("#current img") == 1
    page.browser.events.clear()
    page.value("document.querySelector('#about button').click()")
    page.browser.wait_for("Page.loadEventFired")
    page.wait("document.activeElement.id === 'token'")
    assert page.value("sessionStorage.length") == 0


def test_a_token_that_is_refused_later_is_asked_for_and_the_request_goes_on(
    tokens, make_playground
):
    page = make_playground(tokens)
    page.open(ready=False)
    page.wait("document.activeElement.id === 'token'")
    page.type(TOKEN)
    page.press("Enter")
    page.wait("document.querySelector('.example')")
    page.generate("a castle")
    page.value("import(new URL('page/api.js', location)).then(api => api.setToken('old'))")
    page.generate("a house")
    assert "Token needed" in page.text("#current")
    assert page.count("#current img") == 0
    page.wait("document.activeElement.id === 'token'")
    page.type(TOKEN)
    page.press("Enter")
    page.wait("document.querySelector('#current img')")
    assert page.text("#current h2") == "a house"


def test_the_page_works_behind_a_path_prefix(fakes, make_playground):
    app = build_app(ServerConfig(stacks=("fake",)), fakes.FakeEngine())
    routes = [Mount("/images/safegen", app)]
    outer = Starlette(routes=routes, lifespan=lambda _: app.router.lifespan_context(app))
    with fakes.serving_app(outer) as address:
        page = make_playground(f"{address}/images/safegen")
        page.open()
        page.generate("a castle")
        assert page.count("#current img") == 1
        assert all(url.startswith((page.address, "blob:")) for url in page.requests())
        assert page.complaints() == []


def test_the_page_waits_for_a_server_that_starts(fakes, make_playground, monkeypatch):
    engine = fakes.FakeEngine()
    with fakes.serving(ServerConfig(stacks=("fake",)), engine) as address:
        page = make_playground(address)
        stacks, engine.stacks = engine.stacks, {}
        page.open(ready=False)
        page.wait("document.querySelector('#current').innerText.includes('no stack')")
        assert "opens by itself" in page.text("#current")
        assert page.browser.find_violations() == []
        engine.stacks = stacks
        page.wait("document.querySelector('.example')")
