"""C2PA manifests: each released image is signed with what made it. The prompt is not in it."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safegen._version import __version__
from safegen.core.documents import read_bytes
from safegen.core.errors import FileError, MissingExtraError
from safegen.core.generation import GenerationConfig
from safegen.core.text import one_line
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import EngineFaultError
from safegen.serve.messages import ImageRequest, StackInfo

if TYPE_CHECKING:
    from c2pa import Signer

ASSERTION = "org.safegen.generation"
"""Label of the assertion with the stack, the request id and the seed."""
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
"""Vocabulary of the International Press Telecommunications Council for the origin of an image."""
MAX_PEM_BYTES = 2**20
"""Most bytes of a certificate or key file."""


@dataclass(frozen=True)
class ManifestSigner:
    """Certificate and key that sign images. Threads may share it."""

    signer: Signer
    """Signer of the C2PA library."""

    def sign_image(
        self, image: bytes, media_type: str, request: ImageRequest, seed: int, stack: StackInfo
    ) -> bytes:
        """Return an image file with a signed manifest.

        Args:
            image: the file.
            media_type: its type: image/png, image/jpeg or image/webp.
            request: the request it belongs to.
            seed: its seed.
            stack: the stack that made it.

        Raises:
            EngineFaultError: it cannot be signed. The unsigned image must not be sent.
        """
        try:
            return _sign(self.signer, image, media_type, build_manifest(request, seed, stack))
        except Exception as error:  # whatever it is, the image stays here
            raise EngineFaultError(f"the image cannot be signed: {one_line(str(error))}") from error


def build_manifest(request: ImageRequest, seed: int, stack: StackInfo) -> dict[str, Any]:
    """Return the manifest of an image: how it was made, from which stack, without the prompt.

    Source: C2PA 2.2, sections "Actions" and "Entity-specific namespaces". An image that started
    from another one is a composite.
    """
    kind = "compositeWithTrainedAlgorithmicMedia" if request.start else "trainedAlgorithmicMedia"
    action = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPES + kind}
    generation = {
        "stack": stack.name,
        "stack_hash": stack.hash,
        "request_id": request.id,
        "seed": str(seed),  # readers in JavaScript round integers beyond 2**53
    }
    return {
        "claim_generator_info": [{"name": "safegen", "version": __version__}],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
            {"label": ASSERTION, "data": generation},
        ],
    }


def load_signer(config: ServerConfig) -> ManifestSigner | None:
    """Return the signer of a server, tried once; None if it has no certificate.

    Raises:
        MissingExtraError: the C2PA library is not installed.
        FileError: the certificate or the key cannot be read, or they cannot sign.
    """
    if config.c2pa_certificate is None or config.c2pa_key is None:
        return None
    try:
        import c2pa
    except ImportError as error:
        raise MissingExtraError("c2pa_certificate", "c2pa-python", "c2pa") from error
    chain, pem = (
        read_bytes(path, limit=MAX_PEM_BYTES) for path in (config.c2pa_certificate, config.c2pa_key)
    )
    try:
        algorithm, key = _read_key(pem)
        signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, chain, key, None))
        _try_signer(signer)
    except (c2pa.C2paError, ValueError, TypeError) as error:
        raise FileError(
            f"{str(config.c2pa_certificate)!r} must be able to sign images with the key "
            f"{str(config.c2pa_key)!r}, got {one_line(str(error))}. Give the chain, the signer's "
            "certificate first, and an unencrypted key."
        ) from error
    return ManifestSigner(signer)


def _read_key(pem: bytes) -> tuple[str, bytes]:
    """Return the name of a key's signature algorithm, and the key as the C2PA library reads it.

    Raises:
        ValueError: it is no private key that C2PA allows.
        TypeError: it is encrypted.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except UnsupportedAlgorithm as error:
        raise ValueError("a key of an unknown kind") from error
    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in curves:
        algorithm = curves[key.curve.name]
    elif isinstance(key, ed25519.Ed25519PrivateKey):
        algorithm = "ed25519"
    elif isinstance(key, rsa.RSAPrivateKey):
        algorithm = "ps256"
    else:
        raise ValueError("a key that is neither RSA, Ed25519 nor on a NIST curve")
    return algorithm, key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _try_signer(signer: Signer) -> None:
    """Sign an image of one pixel and verify it.

    Raises:
        C2paError: it cannot be signed.
        ValueError: the signature is not valid.
    """
    import c2pa
    from PIL import Image

    blank = io.BytesIO()
    Image.new("L", (1, 1)).save(blank, format="PNG")
    request = ImageRequest("trial", "", "", (0,), GenerationConfig())
    manifest = build_manifest(request, 0, StackInfo("", "", ""))
    signed = _sign(signer, blank.getvalue(), "image/png", manifest)
    with c2pa.Reader("image/png", io.BytesIO(signed)) as reader:
        if reader.get_validation_state() not in ("Valid", "Trusted"):
            raise ValueError("a signature that is not valid")


def _sign(signer: Signer, image: bytes, media_type: str, manifest: dict[str, Any]) -> bytes:
    """Return an image file with a signed manifest; raises `C2paError`."""
    import c2pa

    context = c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}})
    with context, c2pa.Builder(json.dumps(manifest), context=context) as builder:
        signed = io.BytesIO()
        builder.sign(signer, media_type, io.BytesIO(image), signed)
        return signed.getvalue()
