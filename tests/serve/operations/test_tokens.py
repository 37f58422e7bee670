"""Token files and rate limits."""

from __future__ import annotations

import hashlib
import hmac
import tomllib

import pytest

from safegen.core.errors import ConfigError, FileError, SafegenWarning
from safegen.serve.operations import tokens
from safegen.serve.operations.limits import RateLimitError, TokenBucket
from safegen.serve.operations.tokens import make_token, read_authorization, read_token_file

TOKEN = "a-token-of-some-length"


def write(path, text, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_token_is_found_by_its_text_or_its_hash(tmp_path):
    token, table = make_token("alice")
    assert len(token) >= 43
    assert token not in table
    path = write(tmp_path / "t.toml", f'{table}\n[bob]\ntoken = "{TOKEN}"\nstacks = ["a", "b"]\n')
    clients = read_token_file(path)
    assert clients.find(token).name == "alice"
    assert clients.find(TOKEN).name == "bob"
    assert clients.find(TOKEN).stacks == ("a", "b")
    for wrong in ("", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), hashlib.sha256(b"x").hexdigest()):
        assert clients.find(wrong) is None
    digest = tomllib.loads(table)["alice"]["token_sha256"]
    assert clients.find(digest) is None  # the hash is no token


def test_two_tokens_are_different_and_names_are_checked():
    assert make_token("alice")[0] != make_token("alice")[0]
    for name in ("", "a b", "a.b", "[a]", "a\nb", "-a", "a" * 65):
        with pytest.raises(ConfigError, match="client's name must have 1 to 64"):
            make_token(name)


def test_every_token_is_compared_whichever_fits(tmp_path, monkeypatch):
    names = [f"client-{k}" for k in range(20)]
    text = "".join(f'[{name}]\ntoken = "{name}-{TOKEN}"\n' for name in names)
    clients = read_token_file(write(tmp_path / "t.toml", text))
    calls = []

    def compare(a, b):
        calls.append(1)
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(tokens, "hmac", type("M", (), {"compare_digest": staticmethod(compare)}))
    for token in (f"client-0-{TOKEN}", f"client-19-{TOKEN}", "nothing"):
        calls.clear()
        clients.find(token)
        assert len(calls) == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a table per client, got none"),
        ("alice = 1", "must have a table per client, got the key 'alice'"),
        ("[alice]\n", "token or token_sha256 must be given, and not both"),
        (f'[alice]\ntoken = "{TOKEN}"\ntoken_sha256 = "{"0" * 64}"', "and not both"),
        (
            '[alice]\ntoken = "secret-short"',
            "token must have 16 or more printable ASCII characters",
        ),
        ("[alice]\ntoken = 1234567890123456789", "token must have 16 or more"),
        *[(f'[alice]\ntoken = "secret-short {end}"', "no spaces") for end in ("abcd", "é" * 8)],
        ('[alice]\ntoken_sha256 = "xyz"', "token_sha256"),
        (f'[alice]\ntoken = "{TOKEN}"\nrequests_per_minute = 0', "requests_per_minute"),
        (f'[alice]\ntoken = "{TOKEN}"\nstacks = []', "stacks"),
        (f'[alice]\ntoken = "{TOKEN}"\nadmin = true', "admin"),
        (f'["a b"]\ntoken = "{TOKEN}"', "client's name must have 1 to 64"),
        (f'[a]\ntoken = "{TOKEN}"\n[b]\ntoken = "{TOKEN}"', "tokens must be different"),
        ("[alice", "is not TOML"),
    ],
)
def test_a_wrong_token_file_is_explained_in_one_line_that_quotes_no_token(tmp_path, text, message):
    path = write(tmp_path / "t.toml", text)
    with pytest.raises(FileError) as caught:
        read_token_file(path)
    assert message in str(caught.value)
    assert "t.toml" in str(caught.value)
    assert "\n" not in str(caught.value)
    for secret in (TOKEN, "secret-short", "1234567890123456789"):
        assert secret not in str(caught.value)


def test_a_file_that_others_can_read_gives_a_warning(tmp_path):
    path = write(tmp_path / "t.toml", f'[alice]\ntoken = "{TOKEN}"\n', 0o644)
    with pytest.warns(SafegenWarning, match="can be read by every user. Run: chmod o="):
        read_token_file(path)


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (b"Bearer abc", "abc"),
        (b"bearer  abc ", "abc"),
        (b"Basic YTpi", "b"),
        (b"Basic YTpiOmM=", "b:c"),
        (b"Basic YQ==", None),
        (b"Basic YTo=", None),
        (b"Basic /+//", None),
        (b"Digest abc", None),
        (b"Bearer", None),
        (b"", None),
        ("Bearer é".encode("latin-1"), "é"),
    ],
)
def test_the_header_is_read_as_clients_send_it(header, token):
    assert read_authorization([(b"authorization", header)]) == token
    assert read_authorization([(b"authorization", header)] * 2) is None
    assert read_authorization([]) is None


def test_a_bucket_permits_a_minute_at_once_and_then_the_rate():
    now = 0.0
    bucket = TokenBucket("requests", 30, clock=lambda: now)
    for _ in range(30):
        bucket.take()
    with pytest.raises(RateLimitError, match="requests must be <= 30 per minute") as caught:
        bucket.take()
    assert caught.value.retry_after == 2
    passed = 0
    for step in range(1, 6001):  # ten minutes, ten attempts a second
        now = step / 10
        try:
            bucket.take()
            passed += 1
        except RateLimitError:
            pass
    assert passed == 300


def test_what_was_refused_costs_nothing_and_a_bucket_is_never_overfull():
    now = 0.0
    bucket = TokenBucket("images", 6, clock=lambda: now)
    bucket.take(4)
    for _ in range(100):
        with pytest.raises(RateLimitError) as caught:
            bucket.take(3)
    assert caught.value.retry_after == 10
    bucket.take(2)
    now = 1e9
    bucket.take(6)
    with pytest.raises(RateLimitError):
        bucket.take()
    with pytest.raises(ConfigError, match="n must be <= 6 for this token, got 7"):
        bucket.take(7)


def test_the_time_to_wait_is_enough():
    for limit in (1, 7, 60, 1000):
        now = 0.0
        bucket = TokenBucket("requests", limit, clock=lambda: now)  # noqa: B023
        bucket.take(limit)
        with pytest.raises(RateLimitError) as caught:
            bucket.take()
        now = float(caught.value.retry_after)
        bucket.take()
