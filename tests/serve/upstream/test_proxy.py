"""A proxy in front of another server: what it sends, what it checks, and what it passes on."""

from __future__ import annotations

import asyncio
import datetime
import io
import ipaddress
import threading
import time

import pytest
import uvicorn
from PIL import Image
from pydantic import ValidationError

from safegen.core.errors import ConfigError, FileError, SafegenWarning
from safegen.serve.config import ServerConfig, UpstreamConfig
from safegen.serve.messages import StartImage
from safegen.serve.upstream import transport
from safegen.serve.upstream.engine import ProxyEngine
from safegen.serve.upstream.transport import UpstreamClient

OPENAI_FIELDS = {"prompt", "n", "response_format", "seed"}
A1111_FIELDS = {
    *("prompt", "seed", "batch_size", "n_iter"),
    *("send_images", "save_images", "do_not_save_grid"),
}


def test_each_image_has_its_seed_and_passes_both_stages(generate, other, checker, tools):
    result = generate(n=3, seed=11)
    assert result.status == 200
    assert [i.tobytes() for i in result.images] == [tools.noise(11 + k).tobytes() for k in range(3)]
    assert [i.tobytes() for i in checker.seen] == [i.tobytes() for i in result.images]
    for outcome in result.answer.outcomes:
        assert [(r.guard, r.calls) for r in outcome.trace.guards] == [
            ("prompt-filter", 1),
            ("judge-filter", 1),
        ]
    alone = generate(seed=12)
    assert alone.images[0].tobytes() == result.images[1].tobytes()


def test_metadata_of_the_other_server_does_not_pass(generate):
    (image,) = generate().images
    assert image.info == {}


def test_only_known_fields_are_sent_and_unset_ones_are_left_to_the_other_server(
    generate, other, kind
):
    generate()
    ((path, headers, fields),) = other.requests
    assert set(fields) == (OPENAI_FIELDS if kind == "openai" else A1111_FIELDS)
    assert "cookie" not in headers
    assert "authorization" not in headers
    other.requests.clear()
    generate(
        num_inference_steps=12,
        guidance_scale=4.0,
        width=72,
        height=64,
        negative_prompt="blurry",
        options={"model": "m"},
    )
    ((path, headers, fields),) = other.requests
    if kind == "openai":
        assert path == "/v1/images/generations"
        assert fields == {
            "prompt": "a castle",
            "model": "m",
            "n": 1,
            "size": "72x64",
            "response_format": "b64_json",
            "seed": 7,
            "num_inference_steps": 12,
            "guidance_scale": 4.0,
            "negative_prompt": "blurry",
        }
    else:
        assert path == "/sdapi/v1/txt2img"
        assert fields["override_settings"] == {"sd_model_checkpoint": "m"}
        assert (fields["steps"], fields["cfg_scale"]) == (12, 4.0)
        assert (fields["width"], fields["height"], fields["negative_prompt"]) == (72, 64, "blurry")


def test_a_field_that_the_other_server_does_not_know_can_be_left_out(generate, other, kind):
    generate(options={"omit": ("seed", "response_format")})
    fields = other.requests[0][2]
    assert ("seed" in fields) == (kind == "a1111")  # every server of that kind knows it
    assert "response_format" not in fields


def test_a_blocked_prompt_never_reaches_the_other_server(generate, other):
    result = generate("a castle covered in skulls", n=2)
    assert (result.status, result.error.code) == (400, "moderation_blocked")
    assert result.error.more["moderation_details"]["moderation_stage"] == "input"
    assert not other.requests
    records = result.answer.outcomes[0].trace.guards
    assert [(r.guard, r.action, r.calls) for r in records] == [
        ("prompt-filter", "block", 1),
        ("judge-filter", "none", 0),
    ]


def test_an_unsafe_image_is_blocked(generate, other):
    result = generate("a grinning castle", n=2)
    assert (result.status, result.images) == (400, [])
    assert result.error.more["moderation_details"]["moderation_stage"] == "output"
    assert {outcome.guard for outcome in result.answer.outcomes} == {"judge-filter"}
    assert other.requests


def test_of_several_images_only_the_safe_ones_are_released(generate, other, tools, kind):
    def answer(kind, fields):
        images = other.images(kind, fields)
        red = Image.new("RGB", (64, 64), "red")
        seeds = range(fields["seed"], fields["seed"] + len(images))
        images = [red if s == 8 else i for s, i in zip(seeds, images, strict=True)]
        return other.respond(kind, [tools.b64(tools.png(i)) for i in images])

    other.answer = answer
    result = generate(n=3, seed=7)
    assert [o.status for o in result.answer.outcomes] == ["released", "blocked", "released"]
    assert [i.tobytes() for i in result.images] == [tools.noise(s).tobytes() for s in (7, 9)]


def test_an_image_of_another_size_than_asked_is_not_released(generate, other, tools):
    other.answer = lambda kind, fields: other.respond(kind, [tools.b64(tools.png(tools.noise(1)))])
    result = generate(width=128, height=64)
    assert (result.status, result.images) == (503, [])
    assert "size" in result.message
    other.answer = None
    assert generate(width=128, height=64).images[0].size == (128, 64)


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_an_edit_sends_the_image_and_its_mask_in_the_words_of_the_interface(
    generate, other, kind, tools
):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    start = StartImage(png_bytes(tools.noise(1)), 0.6, png_bytes(mask))
    assert generate(start=start).status == 200
    ((path, _, fields),) = other.requests
    if kind == "openai":
        assert path == "/v1/images/edits"
        assert fields["image"] == start.image
        assert (fields["prompt"], fields["n"], fields["seed"]) == ("a castle", "1", "7")
        alpha = Image.open(io.BytesIO(fields["mask"])).getchannel("A")
        assert (alpha.getpixel((0, 0)), alpha.getpixel((63, 0))) == (0, 255)
    else:
        assert path == "/sdapi/v1/img2img"
        assert fields["init_images"] == [tools.b64(start.image)]
        assert fields["mask"] == tools.b64(start.mask)
        assert (fields["denoising_strength"], fields["inpainting_mask_invert"]) == (0.6, 0)


def test_an_unsafe_start_image_never_reaches_the_other_server(generate, other):
    start = StartImage(png_bytes(Image.new("RGB", (64, 64), "red")), 0.5)
    result = generate(start=start)
    assert result.status == 400
    assert result.error.more["moderation_details"]["moderation_stage"] == "input"
    assert not other.requests


def test_the_token_goes_to_the_other_server_alone(generate, other, tmp_path, kind, tools):
    file = tmp_path / "token"
    file.write_text("secret-token\n")
    file.chmod(0o644)
    with pytest.warns(SafegenWarning, match="can be read by every user"):
        generate(options={"token_file": file})
    file.chmod(0o600)
    assert other.requests[0][1]["authorization"] == "Bearer secret-token"
    file.write_text("user:word")
    generate(options={"token_file": file})
    own = "Basic dXNlcjp3b3Jk" if kind == "a1111" else "Bearer user:word"
    assert other.requests[1][1]["authorization"] == own


@pytest.mark.parametrize("text", ["", "two words", "tab\ttab", "\xe9", "x\ny", "x" * 5000])
def test_a_file_without_one_token_is_refused(make_config, tmp_path, text):
    (tmp_path / "token").write_text(text, encoding="latin-1")
    (tmp_path / "token").chmod(0o600)
    with pytest.raises(FileError):
        UpstreamClient(make_config(token_file=tmp_path / "token").upstream)


@pytest.mark.parametrize(
    "url",
    [
        *("", "127.0.0.1:80", "ftp://127.0.0.1", "http://", "http:///v1", "http://a b"),
        *("http://user:word@127.0.0.1", "http://127.0.0.1?x=1", "http://127.0.0.1/#x"),
        *("http://127.0.0.1\n", "http://127.0.0.1:port", "http://[::1", "http://127.0.0.1:99999"),
    ],
)
def test_an_invalid_address_is_refused_in_one_line(make_config, url):
    def build():
        UpstreamClient(make_config(url=url).upstream)

    with pytest.raises((ConfigError, ValidationError)) as error:
        build()
    assert isinstance(error.value, ValidationError) or "\n" not in str(error.value)


def test_the_path_of_the_interface_may_be_given(make_config):
    for url in ("http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1/"):
        client = UpstreamClient(make_config(url=url).upstream)
        joined = client._join("/v1/images/generations")
        assert str(joined) == "http://127.0.0.1:8000/v1/images/generations"
    client = UpstreamClient(make_config(url="https://proxy.example/images").upstream)
    assert str(client._join("/v1/models")) == "https://proxy.example/images/v1/models"


async def wait_until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_client_that_leaves_closes_the_request(make_config, checker, other, tools):
    async def run():
        engine = ProxyEngine(make_config(timeout=20), checker)
        await engine.start()
        task = asyncio.create_task(engine.generate(tools.make_request("hang")))
        await wait_until(lambda: other.requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.state().running == 0
        await wait_until(lambda: other.num_left == 1)
        await engine.stop()

    asyncio.run(run())


def test_a_drain_answers_the_requests_that_run(make_config, checker, other, tools):
    async def run():
        engine = ProxyEngine(make_config(timeout=20), checker)
        await engine.start()

        def start():
            return asyncio.create_task(tools.send(engine, tools.make_request("hang")))

        tasks = [start(), start()]
        await wait_until(lambda: len(other.requests) == 2)
        assert engine.progress("request-1") > 0
        await engine.drain(0.05)
        for result in await asyncio.gather(*tasks):
            assert (result.status, result.error.code) == (503, "draining")
        assert (await start()).error.code == "draining"
        await engine.stop()

    asyncio.run(run())


def test_an_unreachable_server_is_named_and_does_not_make_the_proxy_unready(
    make_config, checker, tools
):
    async def run():
        engine = ProxyEngine(make_config(url="http://127.0.0.1:9"), checker)
        assert not engine.state().is_ready
        await engine.start()
        await wait_until(lambda: engine.state().reason)
        assert engine.state().is_ready
        assert engine.state().reason == "the other server cannot be reached"
        result = await tools.send(engine, tools.make_request())
        assert (result.status, result.error.code) == (502, "upstream_error")
        checker.num_workers = 0
        assert not engine.state().is_ready
        await engine.stop()

    asyncio.run(run())


def test_the_queue_is_bounded(make_config, checker, other, tools):
    async def run():
        engine = ProxyEngine(make_config(max_connections=1, max_queue=2), checker)
        await engine.start()
        tasks = [
            asyncio.create_task(tools.send(engine, tools.make_request("hang"))) for _ in range(5)
        ]
        await wait_until(lambda: sum(task.done() for task in tasks) == 2)
        other.is_released = True
        results = await asyncio.gather(*tasks)
        assert sorted(r.status for r in results) == [200, 200, 200, 429, 429]
        await engine.stop()

    asyncio.run(run())


def test_many_clients_get_the_images_of_their_own_seeds(make_config, checker, tools):
    async def run():
        engine = ProxyEngine(make_config(), checker)
        await engine.start()
        requests = [tools.make_request(n=2, seed=10 * k) for k in range(64)]
        results = await asyncio.gather(*(tools.send(engine, request) for request in requests))
        await engine.stop()
        for request, result in zip(requests, results, strict=True):
            assert result.status == 200, result.message
            assert [i.tobytes() for i in result.images] == [
                tools.noise(seed).tobytes() for seed in request.seeds
            ]

    asyncio.run(run())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Return the files of a certificate for 127.0.0.1 that no authority has signed, and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(built.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def tls_address(other, certificate):
    """Yield the https address of the other server."""
    options = {"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1]}
    server = uvicorn.Server(uvicorn.Config(other.app, port=0, log_level="critical", **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"https://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


def test_a_certificate_is_verified(generate, other, tls_address, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))  # the environment changes nothing
    transport._tls_context.cache_clear()
    result = generate(options={"url": tls_address})
    assert (result.status, result.images, other.requests) == (502, [], [])
    result = generate(options={"url": tls_address, "ca_file": certificate[0]})
    assert (result.status, len(result.images)) == (200, 1)


def test_a_file_without_certificates_is_refused(make_config, tmp_path, certificate):
    (tmp_path / "ca.pem").write_text("none")
    with pytest.raises(FileError, match="certificates"):
        UpstreamClient(make_config(ca_file=tmp_path / "ca.pem").upstream)


def test_proxies_of_the_environment_are_not_used(generate, monkeypatch, other):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert generate().status == 200


def test_black_images_of_another_safegen_are_not_released(serving, fakes, checker, tools):
    with serving(ServerConfig(stacks=("fake",)), fakes.FakeEngine()) as url:
        config = ServerConfig(
            upstream=UpstreamConfig(url=url, kind="a1111"), guards=("judge-filter",)
        )

        async def run():
            engine = ProxyEngine(config, checker)
            await engine.start()
            try:
                return await tools.send(engine, tools.make_request("partly a castle", n=3))
            finally:
                await engine.stop()

        result = asyncio.run(run())
    assert [o.status for o in result.answer.outcomes] == ["released", "blocked", "released"]
    assert result.answer.outcomes[1].categories == ("upstream",)
    assert [image.size for image in result.images] == [(64, 64)] * 2
