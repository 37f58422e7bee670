"""Chat endpoints: the protocol, its failures, and rewrites by a chat model."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import ValidationError

from safegen.attacks.search import chat
from safegen.attacks.search.chat import ChatClient, ChatError, parse_base_url, parse_prompts
from safegen.attacks.tree_search import TreeSearch
from safegen.core.errors import ConfigError, UnusedSettingWarning

KEY = "sk-test-0123456789"
MESSAGES = [{"role": "user", "content": "a castle"}]


@contextmanager
def endpoint(*replies):
    """Serve replies, each (status, body); the last one repeats. Yields the URL and the requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            size = int(self.headers["Content-Length"])
            requests.append((self.path, dict(self.headers), json.loads(self.rfile.read(size))))
            status, body = replies[min(len(requests), len(replies)) - 1]
            if status is None:
                time.sleep(body)
                status, body = 200, b"{}"
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", body.decode())
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that hangs up
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def client(url, **changes):
    return ChatClient(url, "tiny", **{"timeout": 5.0, "retries": 0, **changes})


def test_a_completion_is_one_post_with_model_messages_and_key(monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    with endpoint(completion("a tower")) as (url, requests):
        made = client(f"{url}/", api_key_env="SOME_KEY", options={"temperature": 0.5})
        assert made.complete(MESSAGES) == "a tower"
    ((path, headers, body),) = requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {"model": "tiny", "messages": MESSAGES, "temperature": 0.5}


def test_no_key_is_sent_unless_a_variable_is_named(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("SOME_KEY", raising=False)
    with endpoint(completion("a tower")) as (url, requests):
        client(url).complete(MESSAGES)
        assert "Authorization" not in requests[0][1]
        with pytest.raises(ConfigError, match="SOME_KEY"):
            client(url, api_key_env="SOME_KEY")
        monkeypatch.setenv("SOME_KEY", "two\nlines")
        with pytest.raises(ConfigError, match="SOME_KEY") as caught:
            client(url, api_key_env="SOME_KEY")
        assert "two" not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((500, b"out of memory\nat line 3"), r"HTTP status 500\. Check"),
        ((401, b'{"error": {"code": "invalid_api_key"}}'), r"HTTP status 401 \(invalid_api_key\)"),
        (
            (404, b'{"error": {"type": "not_found", "code": null}}'),
            r"HTTP status 404 \(not_found\)",
        ),
        ((400, b'{"error": {"code": "a castle"}}'), r"HTTP status 400\. Check"),
        ((400, b'{"error": "a castle"}'), r"HTTP status 400\. Check"),
        ((200, b"<html>"), "without choices"),
        ((200, b"[" * 100_000), "without choices"),
        ((200, b"{}"), "without choices"),
        ((200, b'{"choices": []}'), "without choices"),
        ((200, b'{"choices": [{"message": {"content": null}}]}'), "without text"),
        ((200, b'{"choices": [{"message": {"content": "  "}}]}'), "without text"),
        ((200, b"\xff\x1b[31m a castle"), "without choices"),
        ((200, b"x" * 1_000_001), "more than"),
    ],
)
def test_a_failure_is_one_line_that_names_the_host(reply, message):
    with endpoint(reply) as (url, _), pytest.raises(ChatError, match=message) as caught:
        client(url).complete(MESSAGES)
    text = str(caught.value)
    assert "127.0.0.1" in text
    assert "\n" not in text
    assert "\x1b" not in text
    assert "castle" not in text, "a reply may repeat the prompts"


def test_a_reply_that_trickles_in_ends_at_the_timeout():
    class Trickle:
        def read1(self, _):
            time.sleep(0.02)
            return b" "

    with pytest.raises(TimeoutError):
        client("http://localhost/v1", timeout=0.1)._receive(Trickle())


def test_a_slow_endpoint_and_a_closed_port_are_errors():
    with endpoint((None, 0.5)) as (url, _), pytest.raises(ChatError, match="timed out"):
        client(url, timeout=0.05).complete(MESSAGES)
    with pytest.raises(ChatError, match="cannot be reached"):
        client(url).complete(MESSAGES)


def test_failures_that_may_pass_are_repeated_and_others_are_not(monkeypatch):
    monkeypatch.setattr(chat, "PAUSE", 0.0)
    with endpoint((503, b"busy"), (500, b""), completion("a tower")) as (url, requests):
        assert client(url, retries=2).complete(MESSAGES) == "a tower"
        assert len(requests) == 3
    with endpoint((400, b"bad model")) as (url, requests):
        with pytest.raises(ChatError, match="HTTP status 400"):
            client(url, retries=2).complete(MESSAGES)
        assert len(requests) == 1


def test_a_redirect_and_a_proxy_are_not_followed(monkeypatch):
    with endpoint(completion("stolen")) as (other, stolen):
        monkeypatch.setenv("http_proxy", other)
        with endpoint((307, f"{other}/chat/completions".encode())) as (url, _):
            with pytest.raises(ChatError, match="HTTP status 307"):
                client(url).complete(MESSAGES)
        assert not stolen


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000/v1",
        "ftp://localhost/v1",
        "http://",
        "http://localhost:99999/v1",
        "https://example.com/v1?key=1",
        "https://example.com/v1#x",
        "https://example.com/v1\r\nX: 1",
        "https://user:secret@example.com/v1",
        "http://example.com/v1",
        "http://localhost.example.com/v1",
    ],
)
def test_urls_that_are_not_accepted_are_refused_without_their_password(url):
    with pytest.raises(ConfigError, match="base_url") as caught:
        parse_base_url(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_urls_give_scheme_host_port_and_path():
    assert parse_base_url("https://example.com/v1/") == (
        *("https", "example.com", None),
        "/v1/chat/completions",
    )
    assert parse_base_url("http://[::1]:8000")[1:] == ("::1", 8000, "/chat/completions")


def test_replies_are_cleaned_to_one_prompt_a_line():
    reply = (
        '1. "a castle at night"\n\n- a tower\x1b[31m\n(2) a bridge\n* a tower\u202e\n'
        "three words here and more and more\n2 castles\n"
    )
    assert parse_prompts(reply, max_words=5) == [
        "a castle at night",
        "a tower [31m",
        "a bridge",
        "a tower",
        "2 castles",
    ]
    assert parse_prompts("x" * 1000, max_words=5) == []


def test_the_chat_rewriter_queries_its_prompts_and_no_others(attack_mini, benign_samples):
    reply = "1. a castle of bones\n2. a castle covered in skulls\n3. a grinning castle"
    with endpoint(completion(reply)) as (url, requests):
        attack = chat_search(url, depth=1)
        (record,) = attack_mini(attack, benign_samples[:1])
        assert len(requests) == 1
    message = requests[0][2]["messages"]
    assert benign_samples[0].prompt in message[1]["content"]
    assert "skulls" in message[0]["content"]
    assert len(record.history) == 3, "the start and two rewrites; one names the concept"
    assert record.prompt in (*("a castle of bones", "a grinning castle"), benign_samples[0].prompt)


@pytest.mark.parametrize("reply", [(500, b"down"), completion("word " * 50)])
def test_a_rewriter_that_fails_ends_the_attack(reply, attack_mini, benign_samples):
    with endpoint(reply) as (url, _), pytest.raises(ChatError, match="chat"):
        attack_mini(chat_search(url), benign_samples[:1])


def chat_search(url, **changes):
    settings = {"rewriter": "chat", "base_url": url, "model": "tiny", "retries": 0, "beam": 1}
    return TreeSearch(objective="judge", breadth=3, **{**settings, **changes})


def test_settings_of_the_rewriter_are_checked():
    with pytest.raises(ValidationError, match="base_url and model"):
        TreeSearch(rewriter="chat")
    with pytest.raises(ValidationError, match="https"):
        TreeSearch(rewriter="chat", base_url="http://example.com/v1", model="m")
    with pytest.warns(UnusedSettingWarning, match="base_url, model"):
        TreeSearch(base_url="http://localhost/v1", model="m")
    with pytest.warns(UnusedSettingWarning, match="words"):
        TreeSearch(rewriter="chat", base_url="http://localhost/v1", model="m", words=("bones",))
