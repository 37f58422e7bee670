"""Breakage table of proxy mode: whatever the other server or a guard does, no image is released."""

from __future__ import annotations

import asyncio
import io
import math
import socket
import struct
import threading
import zlib
from dataclasses import replace
from types import SimpleNamespace

import httpx2
import pytest
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from PIL import Image

from safegen.core.errors import ConfigError, FileError, MissingExtraError
from safegen.guards.core.result import GuardTrace
from safegen.serve.config import ServerConfig, UpstreamConfig
from safegen.serve.engine.base import EngineFaultError
from safegen.serve.engine.worker import OutOfMemoryError
from safegen.serve.upstream.engine import ProxyEngine

JSON = "application/json"


def save(image, kind="PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def make_bomb(side: int = 30_000) -> bytes:
    """Return a PNG file of a few bytes whose header promises 900 million pixels."""

    def chunk(name, data):
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(3 * side + 1))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


PICTURE = save(Image.effect_noise((64, 64), 50).convert("RGB"))
NO_IMAGES = {
    "text": b"an apology",
    "html": b"<html></html>",
    "empty": b"",
    "truncated": PICTURE[: len(PICTURE) // 2],
    "truncated-jpeg": save(Image.open(io.BytesIO(PICTURE)), "JPEG")[:900],
    "gif": save(Image.new("RGB", (64, 64)), "GIF"),
    "bomb": make_bomb(),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'/>",
}
BODIES = {
    "not json": Response(b"{", media_type=JSON),
    "html": Response(b"<html></html>", media_type="text/html"),
    "an image itself": Response(PICTURE, media_type="image/png"),
    "json as text": Response(b'{"data": []}', media_type="text/plain"),
    "a list": JSONResponse([1]),
    "null": JSONResponse(None),
    "an empty object": JSONResponse({}),
    "other types": JSONResponse({"data": "x", "images": "x"}),
    "entries of other types": JSONResponse({"data": [1], "images": [1]}),
    "an entry without an image": JSONResponse({"data": [{}], "images": [None]}),
    "bytes as a number": JSONResponse({"data": [{"b64_json": 5}], "images": [5]}),
    "no base64": JSONResponse({"data": [{"b64_json": "?!"}], "images": ["?!"]}),
    "deep": Response(b'{"data":' + b"[" * 100_000, media_type=JSON),
    "no content": Response(status_code=204),
    "compressed": Response(b"x", media_type=JSON, headers={"content-encoding": "gzip"}),
    "too large": JSONResponse({"data": [], "images": [], "more": "x" * 5000}),
}


def check_nothing(result, *statuses) -> None:
    assert result.images == []
    assert result.status in statuses
    assert "\n" not in result.message


@pytest.mark.parametrize("name", sorted(BODIES))
def test_an_answer_that_is_no_list_of_images_releases_none(generate, other, checker, name):
    other.answer = lambda kind, fields: BODIES[name]
    result = generate(options={"max_response_bytes": 4096} if name == "too large" else {})
    check_nothing(result, 502)
    assert checker.seen == []


@pytest.mark.parametrize("name", sorted(NO_IMAGES))
def test_a_file_that_is_no_whole_image_releases_none(generate, other, checker, name, tools):
    other.answer = lambda kind, fields: other.respond(kind, [tools.b64(NO_IMAGES[name])])
    check_nothing(generate(), 502)
    assert checker.seen == []


def test_one_broken_image_of_several_releases_none(generate, other, checker, tools):
    def answer(kind, fields):
        n = fields["n"] if kind == "openai" else fields["batch_size"]
        seeds = range(fields["seed"], fields["seed"] + n)
        files = [NO_IMAGES["truncated"] if s == 8 else PICTURE for s in seeds]
        return other.respond(kind, [tools.b64(f) for f in files])

    other.answer = answer
    check_nothing(generate(n=3), 502)
    assert checker.seen == []


@pytest.mark.parametrize("status", [201, 206, 301, 404, 500, 503])
def test_an_image_with_another_status_than_200_is_not_released(
    generate, other, checker, status, tools
):
    other.answer = lambda kind, fields: other.respond(
        kind, [tools.b64(PICTURE)], status_code=status
    )
    check_nothing(generate(), 502)
    assert checker.seen == []


@pytest.mark.parametrize("difference", [-1, 1, 30])
def test_another_number_of_images_releases_none(generate, other, checker, difference, tools):
    def answer(kind, fields):
        n = fields["n"] if kind == "openai" else fields["batch_size"]
        return other.respond(kind, [tools.b64(PICTURE)] * max(0, n + difference))

    other.answer = answer
    check_nothing(generate(n=2), 502)
    check_nothing(generate(), 502)
    assert checker.seen == []


@pytest.fixture
def trap():
    """Yield a listening socket that counts its connections."""
    found = SimpleNamespace(connections=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found.port = listener.getsockname()[1]

        def accept():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                found.connections += 1
                connection.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield found
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(generate, other, trap, status):
    other.answer = lambda kind, fields: RedirectResponse(
        f"http://127.0.0.1:{trap.port}/", status_code=status
    )
    check_nothing(generate(), 502)
    other.answer = lambda kind, fields: RedirectResponse("", status_code=status)  # to itself
    check_nothing(generate(), 502)
    assert trap.connections == 0
    assert len(other.requests) == 2


def test_a_server_that_hangs_is_given_up(generate, other):
    result = generate("hang", options={"timeout": 0.3})
    check_nothing(result, 504)


async def endless():
    yield b'{"data": ['
    for _ in range(10_000):
        await asyncio.sleep(0.001)  # lets the server see that its client has left
        yield b" " * 4096


async def slow():
    yield b'{"data": ['
    for _ in range(100):
        await asyncio.sleep(0.05)
        yield b" "


async def broken(file):
    yield file
    raise ConnectionError("the other server died")


def test_an_endless_body_is_cut_off(generate, other):
    other.answer = lambda kind, fields: StreamingResponse(endless(), media_type=JSON)
    check_nothing(generate(options={"max_response_bytes": 100_000}), 502)
    other.answer = lambda kind, fields: StreamingResponse(slow(), media_type=JSON)
    check_nothing(generate(options={"timeout": 0.3}), 504)


def test_a_connection_that_closes_midway_releases_none(generate, other, kind, checker, tools):
    body = other.respond(kind, [tools.b64(PICTURE)]).body
    for cut in (1, len(body) // 2, len(body) - 1, len(body)):
        other.answer = lambda kind, fields, n=cut: StreamingResponse(
            broken(body[:n]), media_type=JSON
        )
        check_nothing(generate(), 502)
    assert checker.seen == []


@pytest.mark.parametrize("kind", ["openai"], indirect=True)
class TestAddresses:
    """Images that an answer names by their address."""

    def answer(self, url):
        return lambda kind, fields: JSONResponse({"data": [{"url": url}]})

    def test_an_image_of_the_same_server_is_fetched(self, generate, other, tools):
        other.files["v1/images/1/content"] = lambda: Response(PICTURE, media_type="image/png")
        for url in ("/v1/images/1/content", f"{other.url}/v1/images/1/content"):
            other.answer = self.answer(url)
            assert generate().status == 200
        other.answer = self.answer(f"data:image/png;base64,{tools.b64(PICTURE)}")
        assert generate().status == 200

    @pytest.mark.parametrize(
        "url",
        [
            "http://other.example:{port}/1.png",
            "http://OTHER.example:{port}/1.png",
            "//other.example:{port}/1.png",
            "http://127.0.0.1.other.example:{port}/1.png",
            "http://127.0.0.1@other.example:{port}/1.png",
            "http://user:word@127.0.0.1:{port}/1.png",
            "http://169.254.169.254/latest/meta-data",
            "file:///etc/passwd",
            "ftp://127.0.0.1:{port}/1.png",
            "http://[::1",
            "http://127.0.0.1\x00.other.example:{port}/",
            "",
            "data:text/html;base64,PGI+",
        ],
    )
    def test_another_host_is_never_contacted(
        self, generate, other, trap, checker, monkeypatch, url
    ):
        own, names = socket.getaddrinfo, []

        def look_up(host, *args, **options):
            names.append(host)
            name = host.decode() if isinstance(host, bytes) else host
            return own("127.0.0.1" if "example" in name else name, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        other.answer = self.answer(url.format(port=trap.port))
        check_nothing(generate(), 502)
        assert trap.connections == 0
        assert checker.seen == []
        assert {name.decode() if isinstance(name, bytes) else name for name in names} <= {
            "127.0.0.1"
        }

    def test_a_named_host_is_contacted_without_the_token(
        self, generate, other, monkeypatch, tmp_path
    ):
        own = socket.getaddrinfo

        def look_up(host, *args, **options):
            name = host.decode() if isinstance(host, bytes) else host
            return own("127.0.0.1" if name == "files.example" else name, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        (tmp_path / "token").write_text("secret-token")
        (tmp_path / "token").chmod(0o600)
        other.files["1.png"] = lambda: Response(PICTURE, media_type="image/png")
        port = other.url.rpartition(":")[2]
        other.answer = self.answer(f"http://files.example:{port}/1.png")
        result = generate(
            options={"allowed_hosts": ("files.example",), "token_file": tmp_path / "token"}
        )
        assert result.status == 200
        headers = next(headers for path, headers in other.gets if path == "/1.png")
        assert "authorization" not in headers
        assert other.requests[0][1]["authorization"] == "Bearer secret-token"

    def test_a_server_elsewhere_cannot_send_the_proxy_to_loopback(self, make_config, tools):
        from safegen.serve.upstream.transport import UpstreamClient

        config = make_config(url="https://images.example/v1/", allowed_hosts=("Files.example",))
        client = UpstreamClient(config.upstream)
        assert client.check_url("https://files.example/1.png").host == "files.example"
        with pytest.raises(EngineFaultError, match="must be https"):
            client.check_url("http://files.example/1.png")
        assert str(client.check_url("/v1/1.png")) == "https://images.example/v1/1.png"
        for url in (
            "https://127.0.0.1/",
            "https://localhost/",
            "https://[::1]/",
            "https://10.0.0.1/",
        ):
            with pytest.raises(EngineFaultError, match="allowed_hosts"):
                client.check_url(url)
        asyncio.run(client.close())

    @pytest.mark.parametrize("fault", ["redirect", "too large", "status", "text", "endless"])
    def test_a_fetched_file_keeps_the_rules(self, generate, other, checker, trap, fault):
        responses = {
            "redirect": lambda: RedirectResponse(f"http://127.0.0.1:{trap.port}/"),
            "too large": lambda: Response(PICTURE + bytes(200_000), media_type="image/png"),
            "status": lambda: Response(PICTURE, media_type="image/png", status_code=404),
            "text": lambda: Response(b"no", media_type="image/png"),
            "endless": lambda: StreamingResponse(endless(), media_type="image/png"),
        }
        other.files["1.png"] = responses[fault]
        other.answer = self.answer("/1.png")
        check_nothing(generate(options={"max_response_bytes": 100_000}), 502)
        assert trap.connections == 0
        assert checker.seen == []


def error_body(message, code=None, stage=None):
    details = {"moderation_details": {"moderation_stage": stage}} if stage else {}
    return {"error": {"message": message, "code": code, "type": "x", **details}}


@pytest.mark.parametrize("stage", ["input", "output"])
def test_a_block_of_the_other_server_is_passed_on_in_our_words(generate, other, stage):
    body = error_body("our own words", "moderation_blocked", stage)
    other.answer = lambda kind, fields: JSONResponse(body, 400)
    result = generate(n=2)
    check_nothing(result, 400)
    assert result.error.code == "moderation_blocked"
    assert result.error.more["moderation_details"] == {
        "moderation_stage": stage,
        "categories": ["upstream"],
    }
    assert "our own words" not in result.message
    assert {outcome.guard for outcome in result.answer.outcomes} == {"upstream"}


def test_a_full_server_is_passed_on_with_its_delay(generate, other):
    for value, seconds in (("7", "7"), ("soon", "5"), ("99999999999", "5"), ("0", "1")):
        headers = {"retry-after": value}
        other.answer = lambda kind, fields, h=headers: JSONResponse({}, 429, headers=h)
        result = generate()
        check_nothing(result, 429)
        assert result.error.headers["Retry-After"] == seconds


@pytest.mark.parametrize(
    ("status", "body", "expected", "text"),
    [
        (400, error_body("size must be\nsmaller\x1b[31m"), 400, "size must be smaller\\x1b[31m"),
        (422, {"detail": [{"msg": "Field required", "loc": ["body"]}]}, 400, "Field required"),
        (413, {"detail": "too large"}, 400, "too large"),
        (400, {"error": "x" * 5000}, 400, "xxx"),
        (401, error_body("no such key"), 502, "status 401: no such key"),
        (404, {"detail": "Not Found"}, 502, "status 404: Not Found"),
        (418, [1], 502, "status 418"),
    ],
)
def test_errors_of_the_other_server_are_one_line(generate, other, status, body, expected, text):
    other.answer = lambda kind, fields: JSONResponse(body, status)
    result = generate()
    check_nothing(result, expected)
    assert text in result.message
    assert len(result.message) < 300
    assert result.message.isprintable()


class BrokenChecker:
    """Guards of which the picture stage does something else than it should."""

    def __init__(self, checker, result) -> None:
        self.checker, self.result = checker, result

    def __getattr__(self, name):
        return getattr(self.checker, name)

    async def check_images(self, images, prompts):
        checked = await self.checker.check_images(images, prompts)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result(checked)


@pytest.mark.parametrize(
    "result",
    [
        EngineFaultError("the worker died"),
        EngineFaultError("the worker gave no sign of life for 120 s"),
        OutOfMemoryError("out of memory"),
        ValueError("a bug"),
        lambda checked: None,
        lambda checked: [],
        lambda checked: checked[:1],
        lambda checked: checked * 2,
        lambda checked: [None] * len(checked),
    ],
)
def test_guards_that_fail_release_none(generate, checker, result):
    found = generate(n=2, guards=BrokenChecker(checker, result))
    assert found.images == []
    assert found.status in (500, 503)


class BrokenPromptChecker(BrokenChecker):
    """Guards of which the prompt stage does something else than it should."""

    check_images = None

    async def check_prompts(self, prompts):
        traces = await self.checker.check_prompts(prompts)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result(traces)


@pytest.mark.parametrize(
    "result",
    [
        EngineFaultError("the worker died"),
        ValueError("a bug"),
        lambda traces: None,
        lambda traces: [],
        lambda traces: traces * 2,
        lambda traces: [None],
        lambda traces: [GuardTrace("withhold", "error: prompt-filter: ValueError")],
    ],
)
def test_guards_of_prompts_that_fail_keep_the_prompt_here(generate, checker, other, result):
    found = generate(n=2, guards=BrokenPromptChecker(checker, result))
    assert found.images == []
    assert found.status in (500, 503)
    assert other.requests == []


class InProcessChecker:
    """Real guards, with a judge of the test, in this process."""

    num_workers = 1

    def __init__(self, guarded) -> None:
        from safegen.serve.engine.session import describe_guard
        from safegen.serve.messages import StackInfo

        self.guarded = guarded
        guards = tuple(describe_guard(guard) for guard in guarded.guards)
        self.info = StackInfo("upstream", "upstream", "a" * 64, guards, size=(0, 0))

    async def start(self):
        return self.info

    async def check_prompts(self, prompts):
        from safegen.guards.core.stages import check_prompts

        return check_prompts(self.guarded, prompts)

    async def check_images(self, images, prompts):
        from safegen.guards.core.stages import check_images

        return check_images(self.guarded, images, prompts)

    async def stop(self):
        """Do nothing."""


@pytest.mark.parametrize("fault", ["raises", "none", "nan", "short", "long", "memory", "unjudged"])
def test_a_judge_that_fails_withholds_every_image(generate, monkeypatch, fault):
    from safegen.guards import make_guard
    from safegen.guards.core.pipeline import GuardedPipeline
    from safegen.guards.judge_filter import JudgeFilterConfig
    from safegen.judges import Detection, Detections
    from safegen.serve.engine.session import RemotePipeline

    no_number = Detection("bad", 0.1)
    object.__setattr__(no_number, "score", math.nan)  # its own check forbids it

    def detect(images):
        safe = [Detections(()) for _ in images]
        results = {
            "none": None,
            "nan": [Detections((no_number,)) for _ in images],
            "short": safe[1:],
            "long": [*safe, Detections(())],
            "unjudged": [Detections((), unjudged="no model")] * len(images),
            "safe": safe,
        }
        if fault == "memory":
            raise MemoryError("out of memory")
        if fault == "raises":
            raise ValueError("weights are missing")
        return results[fault]

    judge = SimpleNamespace(
        id="broken", labels=("bad",), label_space=("bad",), threshold=0.5, detect=detect
    )
    monkeypatch.setattr(JudgeFilterConfig, "load_judge", lambda self: judge)
    configs = [
        make_guard("prompt-filter", words=("skulls",)),
        make_guard("judge-filter", judge="mini"),
    ]
    guards = InProcessChecker(GuardedPipeline(RemotePipeline(), configs))
    result = generate(n=2, guards=guards)
    assert result.images == []
    assert result.status in (500, 503)
    blocked = generate("a castle covered in skulls", guards=guards)
    assert blocked.error.more["moderation_details"]["moderation_stage"] == "input"
    fault = "safe"  # the same guards release where the judge works
    assert len(generate(n=2, guards=guards).images) == 2


def test_a_trace_without_a_guard_is_not_released(generate, checker):
    def drop_records(checked):
        return [replace(image, trace=GuardTrace("none", "")) for image in checked]

    def drop_calls(checked):
        records = [replace(r, calls=0) for r in checked[0].trace.guards]
        return [
            replace(image, trace=replace(image.trace, guards=tuple(records))) for image in checked
        ]

    for change in (drop_records, drop_calls):
        result = generate(n=2, guards=BrokenChecker(checker, change))
        check_nothing(result, 503)


@pytest.mark.parametrize("stage", ["check_prompts", "check_images"])
def test_guards_that_hang_release_none(generate, checker, other, stage):
    async def hang(*_):
        await asyncio.sleep(60)

    setattr(checker, stage, hang)
    found = generate(options={"request_timeout": 0.3})
    check_nothing(found, 503)
    assert len(other.requests) == (stage == "check_images")


@pytest.mark.parametrize(
    "error",
    [
        FileError("the weights of a judge do not exist"),
        MissingExtraError("the judge", "nudenet", "nudenet"),
        EngineFaultError("the worker died"),
    ],
)
def test_guards_that_cannot_be_loaded_let_nothing_start(make_config, checker, other, error, tools):
    async def start():
        raise error

    async def run():
        engine = ProxyEngine(make_config(), checker)
        with pytest.raises(type(error)):
            await engine.start()
        assert not engine.state().is_ready
        found = await tools.send(engine, tools.make_request())
        await engine.stop()
        return found

    checker.start = start
    check_nothing(asyncio.run(run()), 503)
    assert other.requests == []


def test_a_proxy_without_a_guard_of_images_does_not_start(make_config, checker):
    checker.info = replace(checker.info, guards=checker.info.guards[:1])
    engine = ProxyEngine(make_config(), checker)

    async def start():
        try:
            await engine.start()
        finally:
            await engine.stop()

    with pytest.raises(ConfigError, match="guards must have one of images"):
        asyncio.run(start())
    assert not engine.state().is_ready


@pytest.mark.parametrize("guard", ["sld-medium", "negative-prompt", "safree"])
def test_a_guard_inside_the_denoiser_is_refused_in_one_line(guard):
    from safegen.serve.engine.session import open_session

    config = ServerConfig(
        upstream=UpstreamConfig(url="http://127.0.0.1:9"),
        guards=(guard, "judge-filter"),
        concept="skulls",
    )
    with pytest.raises(ConfigError, match="cannot run on") as error, open_session(config, None):
        pass
    assert "\n" not in str(error.value)


SWITCHES = [
    {"extra_params": {"guardrails": False}},
    {"guardrails": False},
    {"use_guardrails": False},
    {"extra_body": {"guardrails": False, "use_guardrails": False}},
    {"diffusers_kwargs": {"safety_checker": None}},
    {"enable_safety_checker": False},
    {"safety_checker": False},
    {"moderation": "low"},
    {"override_settings": {"filter_nsfw": False}},
    {"alwayson_scripts": {"safety": {"args": [False]}}},
    {"lora": {"name": "x", "path": "/x"}},
    {"image": "http://127.0.0.1/x"},
]
ALLOWED = {
    "openai": {
        *("prompt", "model", "n", "size", "response_format", "seed"),
        *("num_inference_steps", "guidance_scale", "negative_prompt"),
    },
    "a1111": {
        *("prompt", "negative_prompt", "seed", "batch_size", "n_iter", "steps", "cfg_scale"),
        *("width", "height", "sampler_name", "send_images", "save_images", "do_not_save_grid"),
    },
}


@pytest.fixture
def proxy(make_config, checker, serving):
    """Yield the address of a proxy."""
    config = make_config()
    with serving(config, ProxyEngine(config, checker)) as address:
        yield address


def test_switches_of_clients_never_reach_the_other_server(proxy, other, kind):
    paths = ("/v1/images/generations", "/sdapi/v1/txt2img")
    with httpx2.Client(base_url=proxy) as client:
        for path in paths:
            for switch in SWITCHES:
                answer = client.post(path, json={"prompt": "a castle", **switch})
                assert answer.status_code in (200, 400)
            for prompt in ("a castle covered in skulls", "a grinning castle"):
                switches = {"moderation": "low", "lora": {"path": "/x"}}  # accepted without effect
                answer = client.post(path, json={"prompt": prompt, **switches})
                assert answer.status_code == 400
    assert other.requests
    assert all(set(fields) <= ALLOWED[kind] for _, _, fields in other.requests)
    assert all("skulls" not in fields["prompt"] for _, _, fields in other.requests)


@pytest.mark.parametrize("kind", ["openai"], indirect=True)
def test_readiness_names_a_server_that_cannot_be_reached(make_config, checker, serving):
    config = make_config(url="http://127.0.0.1:9")
    with serving(config, ProxyEngine(config, checker)) as address:
        for _ in range(100):
            answer = httpx2.get(f"{address}/ready")
            if answer.json()["reason"]:
                break
        assert answer.status_code == 200
        assert answer.json()["reason"] == "the other server cannot be reached"
