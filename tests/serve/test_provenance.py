"""C2PA manifests of released images, with a certificate chain that the test makes."""

from __future__ import annotations

import base64
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from safegen.core.errors import FileError, MissingExtraError
from safegen.core.generation import GenerationConfig
from safegen.serve.app import build_app
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import EngineFaultError
from safegen.serve.messages import ImageRequest, StackInfo, StartImage
from safegen.serve.operations.audit import read_audit_log
from safegen.serve.provenance import ASSERTION, load_signer
from tests.serve.conftest import FakeEngine, serving_app

c2pa = pytest.importorskip("c2pa")
PROMPT = "a castle above a lake"
STACK = StackInfo("mini+edit", "mini", "ab" * 32)


def make_certificate(name, key, issuer=None, issuer_key=None):
    """Return a certificate: of a root if it has no issuer, else of a signer of images."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    is_root, signing_key, now = issuer is None, issuer_key or key, datetime.now(UTC)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "safegen tests"),
        ]
    )
    usages = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment")
    usages += ("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    allowed = {"key_cert_sign", "crl_sign"} if is_root else {"digital_signature"}
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if is_root else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{u: u in allowed for u in usages}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()),
            critical=False,
        )
    )
    if not is_root:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(usage, critical=False)
    is_edwards = isinstance(signing_key, Ed25519PrivateKey)
    return builder.sign(signing_key, None if is_edwards else hashes.SHA256())


def make_key(kind):
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if kind == "rsa":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key({"p256": ec.SECP256R1, "p384": ec.SECP384R1}[kind]())


def to_pem(key, *, password: bytes | None = None) -> bytes:
    from cryptography.hazmat.primitives import serialization as s

    encryption = s.BestAvailableEncryption(password) if password else s.NoEncryption()
    return key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, encryption)


def write_chain(folder: Path, kind: str = "p256") -> ServerConfig:
    """Return settings whose certificate and key are in a folder."""
    from cryptography.hazmat.primitives.serialization import Encoding

    root_key, key = make_key("p256"), make_key(kind)
    root = make_certificate("root", root_key)
    leaf = make_certificate("signer", key, root, root_key)
    chain = b"".join(c.public_bytes(Encoding.PEM) for c in (leaf, root))
    (folder / "chain.pem").write_bytes(chain)
    (folder / "key.pem").write_bytes(to_pem(key))
    return config_of(folder)


def config_of(folder: Path) -> ServerConfig:
    return ServerConfig(
        stacks=("mini",), c2pa_certificate=folder / "chain.pem", c2pa_key=folder / "key.pem"
    )


@pytest.fixture(scope="module")
def signer(tmp_path_factory):
    return load_signer(write_chain(tmp_path_factory.mktemp("chain")))


def make_request(**more) -> ImageRequest:
    return ImageRequest("req-1", PROMPT, STACK.name, (7,), GenerationConfig(), **more)


def encode(image_format: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(buffer, format=image_format)
    return buffer.getvalue()


def read(data: bytes, image_format: str = "png"):
    with c2pa.Reader(f"image/{image_format}", io.BytesIO(data)) as reader:
        failures = reader.get_validation_results()["activeManifest"]["failure"]
        return reader.get_active_manifest(), reader.get_validation_state(), failures


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_a_signed_image_keeps_its_pixels_and_verifies(signer, image_format):
    plain = encode(image_format)
    signed = signer.sign_image(plain, f"image/{image_format}", make_request(), 7, STACK)
    manifest, state, failures = read(signed, image_format)
    assert state == "Valid"
    assert [f["code"] for f in failures] == ["signingCredential.untrusted"]  # a root of our own
    assert manifest["claim_generator_info"][0]["name"] == "safegen"
    with Image.open(io.BytesIO(signed)) as a, Image.open(io.BytesIO(plain)) as b:
        assert a.convert("RGB").tobytes() == b.convert("RGB").tobytes()


def test_the_manifest_names_stack_request_and_seed_and_not_the_prompt(signer):
    signed = signer.sign_image(encode(), "image/png", make_request(), 2**60 + 1, STACK)
    manifest, _, _ = read(signed)
    data = {a["label"]: a["data"] for a in manifest["assertions"]}
    action = data["c2pa.actions.v2"]["actions"][0]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert data[ASSERTION] == {
        "stack": STACK.name,
        "stack_hash": STACK.hash,
        "request_id": "req-1",
        "seed": str(2**60 + 1),
    }
    assert PROMPT.encode() not in signed
    assert PROMPT not in json.dumps(manifest)


def test_an_image_that_started_from_another_is_a_composite(signer):
    request = make_request(start=StartImage(encode(), 0.5))
    manifest, _, _ = read(signer.sign_image(encode(), "image/png", request, 7, STACK))
    action = manifest["assertions"][0]["data"]["actions"][0]
    assert action["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")


def test_a_changed_pixel_breaks_the_signature(signer):
    signed = bytearray(signer.sign_image(encode(), "image/png", make_request(), 7, STACK))
    signed[signed.index(b"IDAT") + 40] ^= 1
    _, state, failures = read(bytes(signed))
    assert state == "Invalid"
    assert "assertion.dataHash.mismatch" in [f["code"] for f in failures]


def test_threads_share_a_signer(signer):
    plain = encode()
    with ThreadPoolExecutor(8) as pool:
        sign = lambda seed: signer.sign_image(plain, "image/png", make_request(), seed, STACK)  # noqa: E731
        signed = list(pool.map(sign, range(32)))
    seeds = [read(data)[0]["assertions"][1]["data"]["seed"] for data in signed]
    assert seeds == [str(seed) for seed in range(32)]


@pytest.mark.parametrize("data", [b"", b"no image", encode()[:200]])
def test_what_cannot_be_signed_is_a_fault(signer, data):
    with pytest.raises(EngineFaultError, match="cannot be signed"):
        signer.sign_image(data, "image/png", make_request(), 7, STACK)


@pytest.mark.parametrize("kind", ["rsa", "ed25519", "p384"])
def test_every_kind_of_key_of_c2pa_signs(tmp_path, kind):
    signer = load_signer(write_chain(tmp_path, kind))
    assert read(signer.sign_image(encode(), "image/png", make_request(), 7, STACK))[1] == "Valid"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("chain.pem", b"no certificate", "must be able to sign"),
        ("chain.pem", None, "does not exist"),
        ("key.pem", b"no key", "must be able to sign"),
        ("key.pem", "other", "must be able to sign"),
        ("key.pem", "encrypted", "unencrypted key"),
        ("key.pem", None, "does not exist"),
    ],
)
def test_files_that_cannot_sign_stop_the_start(tmp_path, file, content, words):
    config = write_chain(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        keys = {"other": lambda: to_pem(make_key("p256"))}
        keys["encrypted"] = lambda: to_pem(make_key("p256"), password=b"secret")
        made = keys[content]() if isinstance(content, str) else content
        (tmp_path / file).write_bytes(made)
    with pytest.raises(FileError, match=words) as caught:
        load_signer(config)
    assert "\n" not in str(caught.value)


def test_a_certificate_without_the_library_names_the_extra(tmp_path, monkeypatch):
    config = write_chain(tmp_path)
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(MissingExtraError, match=r"safegen\[c2pa\]"):
        load_signer(config)


@pytest.fixture(scope="module")
def signing_server(tmp_path_factory):
    """Yield the address of a server that signs its images, and what signs them."""
    folder = tmp_path_factory.mktemp("chain")
    config = write_chain(folder).model_copy(update={"audit_log": folder / "audit.jsonl"})
    app = build_app(config, FakeEngine())
    with serving_app(app) as address:
        yield address, app.state.service


def generate(address, **body):
    url = f"{address}/v1/images/generations"
    body = {"prompt": "a castle", "safegen": {"seed": 3}, **body}
    return httpx2.post(url, json=body, timeout=30)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_every_image_of_the_openai_interface_is_signed(signing_server, image_format):
    answer = generate(signing_server[0], n=2, output_format=image_format).json()
    for entry, image in zip(answer["data"], answer["safegen"]["images"], strict=True):
        manifest, state, _ = read(base64.b64decode(entry["b64_json"]), image_format)
        assert state == "Valid"
        data = manifest["assertions"][-1]["data"]
        assert data["request_id"] == answer["safegen"]["request_id"]
        assert data["seed"] == str(image["seed"])


def test_every_image_of_the_a1111_interface_is_signed(signing_server):
    url = f"{signing_server[0]}/sdapi/v1/txt2img"
    body = {"prompt": "a castle", "width": 64, "height": 64}
    (data,) = httpx2.post(url, json=body, timeout=30).json()["images"]
    assert read(base64.b64decode(data))[1] == "Valid"


def test_a_server_that_cannot_sign_sends_no_image(signing_server):
    address, service = signing_server
    service.signer.signer.close()
    answer = generate(address)
    assert answer.status_code == 503
    assert "data" not in answer.json()
    url = f"{address}/sdapi/v1/txt2img"
    answer = httpx2.post(url, json={"prompt": "a castle", "width": 64, "height": 64}, timeout=30)
    assert answer.status_code == 503
    assert "images" not in answer.json()
    records = read_audit_log(service.audit.path)[-4:]  # two per request: the last one holds
    assert [record["images"][0]["status"] for record in records] == ["released", "fault"] * 2
    assert records[1]["images"][0]["reason"] == records[3]["images"][0]["reason"] == "encoding"
    assert records[0]["request"] == records[1]["request"]


def test_no_certificate_means_no_signer():
    assert load_signer(ServerConfig(stacks=("mini",))) is None
