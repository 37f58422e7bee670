"""Who may call: tokens, hosts, origins, rate limits and stacks, over HTTP."""

from __future__ import annotations

import base64

import httpx2
import pytest
from openai import AuthenticationError, OpenAI

from safegen.core.errors import ConfigError, UnknownNameError
from safegen.serve.app import build_app
from safegen.serve.config import ServerConfig
from tests.serve.conftest import STACK, FakeEngine, serving

ALICE, BOB = "alice-" + "a" * 20, "bob-" + "b" * 20
SECOND = STACK.__class__(**{**STACK.__dict__, "name": "second"})
OTHERS = {"host": "evil.example", "origin": "https://evil.example"}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Return a token file: Alice may use one stack, Bob make few requests."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    path.write_text(
        f'[alice]\ntoken = "{ALICE}"\nstacks = ["second"]\n'
        f'[bob]\ntoken = "{BOB}"\nrequests_per_minute = 4\nimages_per_minute = 3\n'
    )
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def guarded(tokens):
    """Yield the address of a server with tokens."""
    config = ServerConfig(stacks=("fake",), token_file=tokens)
    with serving(config, FakeEngine((STACK, SECOND))) as address:
        yield address


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def generate(address, headers=None, **body):
    url = f"{address}/v1/images/generations"
    return httpx2.post(url, json={"prompt": "a castle", **body}, headers=headers, timeout=20)


def test_only_health_readiness_and_the_page_need_no_token(guarded):
    for path in ("/health", "/ready"):
        assert httpx2.get(guarded + path).status_code == 200
    assert httpx2.get(f"{guarded}/").status_code in (200, 404)
    assert httpx2.get(f"{guarded}/page/none.js").status_code == 404
    private = ("/metrics", "/openapi.json", "/docs", "/v1/models", "/sdapi/v1/options", "/nothing")
    for path in (*private, "/page", "//health", "/page/../metrics", "/health/"):
        answer = httpx2.get(guarded + path)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx2.post(f"{guarded}/health").status_code == 401
    assert httpx2.get(f"{guarded}/metrics", headers=bearer(ALICE)).status_code == 200


@pytest.mark.parametrize(
    "value", ["", "Bearer", f"Bearer {ALICE[:-1]}", f"Bearer {ALICE}x", ALICE, "Basic !"]
)
def test_a_wrong_token_is_refused(guarded, value):
    answer = generate(guarded, {"Authorization": value})
    assert answer.status_code == 401
    assert "alice" not in answer.text


def test_two_tokens_in_one_request_are_refused(guarded):
    headers = [("Authorization", f"Bearer {ALICE}"), ("Authorization", "Bearer x")]
    assert generate(guarded, headers).status_code == 401


def test_the_password_of_basic_authentication_is_a_token(guarded):
    word = base64.b64encode(f"anything:{ALICE}".encode()).decode()
    assert generate(guarded, {"Authorization": f"basic {word}"}).status_code == 200


def test_the_openai_client_says_that_its_key_is_wrong(guarded):
    with OpenAI(base_url=f"{guarded}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(AuthenticationError) as caught:
            client.images.generate(prompt="a castle")
        assert caught.value.code == "invalid_api_key"
    with OpenAI(base_url=f"{guarded}/v1", api_key=ALICE, max_retries=0) as client:
        assert client.images.generate(prompt="a castle").data


def test_a_client_gets_only_its_own_stacks(guarded):
    assert generate(guarded, bearer(ALICE), model="second").status_code == 200
    assert generate(guarded, bearer(ALICE)).status_code == 200
    answer = generate(guarded, bearer(ALICE), model="safe")
    assert answer.status_code == 404
    assert "Known: second." in answer.json()["error"]["message"]
    models = httpx2.get(f"{guarded}/v1/models", headers=bearer(ALICE)).json()["data"]
    assert [model["id"] for model in models] == ["second"]
    models = httpx2.get(f"{guarded}/sdapi/v1/sd-models", headers=bearer(ALICE)).json()
    assert ["second" in str(model) for model in models] == [True]


def test_the_address_of_an_image_is_its_token(guarded):
    answer = generate(guarded, bearer(ALICE), response_format="url").json()
    url = answer["data"][0]["url"]
    assert len(url.rpartition("/")[2]) >= 22  # 128 random bits
    assert httpx2.get(url).headers["content-type"] == "image/png"
    assert httpx2.get(url[:-1]).status_code == 404
    assert httpx2.post(url).status_code == 401


def test_requests_and_images_beyond_the_limit_get_429_with_the_time_to_wait(guarded):
    assert generate(guarded, bearer(BOB), n=4).status_code == 400  # never possible
    assert generate(guarded, bearer(BOB), n=3).status_code == 200
    answer = generate(guarded, bearer(BOB), n=1)
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert 15 <= int(answer.headers["retry-after"]) <= 20
    generate(guarded, bearer(BOB))
    answer = generate(guarded, bearer(BOB))
    assert answer.status_code == 429
    assert "requests must be <= 4 per minute" in answer.json()["error"]["message"]
    assert generate(guarded, bearer(ALICE)).status_code == 200  # others have their own limits


@pytest.mark.parametrize("name", ["host", "origin"])
def test_another_site_cannot_call_the_server(server, engine, name):
    answer = generate(server, {name: OTHERS[name]})
    assert answer.status_code == 403
    assert engine.requests == []


@pytest.mark.parametrize(
    "origin",
    ["null", "http://127.0.0.1", "file://", "http://127.0.0.1:1", "", "http://[::1", "\xff"],
)
def test_an_origin_that_only_looks_like_the_server_is_refused(server, engine, origin):
    assert generate(server, {"origin": origin.encode("latin-1")}).status_code == 403
    assert engine.requests == []


def test_the_own_page_may_call_the_server_by_each_of_its_names(server):
    port = server.rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST.:{port}", f"[::1]:{port}"):
        headers = {"host": host, "origin": f"http://{host}"}
        assert generate(server, headers).status_code == 200, host
    assert generate(server, {"host": f"127.0.0.1.evil.example:{port}"}).status_code == 403
    assert generate(server, {"host": "192.0.2.1"}).status_code == 403


def test_permitted_sites_and_hosts_may_call_and_others_may_not():
    config = ServerConfig(
        stacks=("fake",),
        allowed_origins=("https://app.example",),
        allowed_hosts=("images.example",),
    )
    with serving(config, FakeEngine()) as address:
        answer = generate(address, {"origin": "https://app.example", "host": "images.example:80"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        preflight = {
            "origin": "https://app.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-lang",
        }
        url = f"{address}/v1/images/generations"
        assert httpx2.options(url, headers=preflight).status_code == 200
        preflight["origin"] = "https://app.example.evil.example"
        assert httpx2.options(url, headers=preflight).status_code == 403


def test_cors_is_off_by_default(server):
    answer = httpx2.get(f"{server}/health", headers={"origin": server})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_every_response_has_its_id_and_forbids_scripts_of_others(server):
    for path in ("/health", "/nothing", "/v1/images/generations"):
        answer = httpx2.get(server + path, headers={"x-request-id": "mine"})
        assert len(answer.headers["x-request-id"]) == 32
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_other_machines_cannot_connect_without_a_token(tokens):
    config = ServerConfig(stacks=("fake",), host="0.0.0.0")
    with pytest.raises(ConfigError, match=r"given with host '0\.0\.0\.0'"):
        build_app(config, FakeEngine())
    with serving(
        config.model_copy(update={"token_file": tokens}), FakeEngine((STACK, SECOND))
    ) as url:
        address = url.replace("0.0.0.0", "127.0.0.1")
        assert generate(address, {**bearer(ALICE), "host": "192.0.2.1"}).status_code == 200
        assert generate(address, {**bearer(ALICE), "host": "evil.example"}).status_code == 403


def test_a_token_for_a_stack_that_does_not_exist_stops_the_start(tokens):
    import asyncio

    app = build_app(ServerConfig(stacks=("fake",), token_file=tokens), FakeEngine())
    with pytest.raises(UnknownNameError, match=r"no stack named 'second'.*Client 'alice' names it"):
        asyncio.run(app.state.service.start())
