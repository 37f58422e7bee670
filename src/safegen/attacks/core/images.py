"""Images that an attacker has, of the concept or harmless, with their masks and latents."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from safegen.core.concept import Concept
from safegen.core.documents import read_bytes
from safegen.core.errors import ConfigError, FileError, SafegenWarning
from safegen.core.registry import TRIPLETS
from safegen.data.images import crop_square, format_size, read_image, size_error
from safegen.data.triplets.triplets import MANIFEST, Role, Triplets, read_role
from safegen.edits.training.samples import preprocess
from safegen.evaluation.samples import EvalSample
from safegen.judges import load_concept_judge
from safegen.models.model import Model

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MASK = "-mask"
"""End of the name of an image's mask, before `.png`."""
MAX_SOURCE_FILE = 2**31
"""Most bytes of a file that an attack reads."""


class ConceptImages:
    """Images of a concept, or harmless ones beside them, of a model's size."""

    def __init__(
        self, model: Model, concept: Concept, source: Path | None, *, harmless: bool = False
    ) -> None:
        """Read and judge the images, and leave out those with the wrong verdict.

        Args:
            model: the model; larger images are shrunk to its size, and others cut to a square.
            concept: its bundled triplets are used without a source.
            source: folder of images, or triplets: a folder, a CSV file or `mini:CONCEPT`.
            harmless: take images without the concept, which are the benign ones of triplets.

        Raises:
            ConfigError: there is no source, or no image is as it should be.
            FileError: the source or an image cannot be read, or an image is too small.

        Warns:
            SafegenWarning: an image is enlarged or left out.
        """
        self._size, self._model = model.size, model
        self._triplets, self._paths = _open_source(concept, source, harmless=harmless)
        judge = load_concept_judge(concept)
        images = self._read(harmless=harmless)
        detections = judge.detect(images)
        wanted = "safe" if harmless else "unsafe"
        self._rows = [
            i
            for i, found in enumerate(detections)
            if found.verdict(judge.labels, judge.threshold) == wanted
        ]
        rule = f"{'be without' if harmless else 'show'} {concept.name!r}"
        if not self._rows:
            raise ConfigError(
                f"images must {rule} to the judge {concept.judge!r}, got none of {len(images)} "
                f"that do in {source or concept.triplets}. Name others."
            )
        if out := len(images) - len(self._rows):
            warnings.warn(
                f"images must {rule} to the judge {concept.judge!r}; {out} of "
                f"{len(images)} are left out",
                SafegenWarning,
                stacklevel=2,
            )
        self.images = [images[i] for i in self._rows]
        self.subjects = [detections[i].subject for i in self._rows]
        self._encoded: dict[int, Tensor] = {}

    def _read(self, *, harmless: bool) -> list[Image.Image]:
        """Return all images of the source, of the model's size."""
        role: Role = "benign" if harmless else "unsafe"
        images, small = [], []
        for row in range(len(self._triplets or self._paths)):
            if self._triplets:
                triplet = self._triplets.rows[row]
                path = self._triplets.folder / getattr(triplet, role)
                image = read_role(self._triplets.folder, triplet, role)
            else:
                path = self._paths[row]
                image = read_image(path)
            if reason := size_error(image):
                raise FileError(f"{path}: {reason}. Use a larger image.")
            if min(image.size) < self._size:
                small.append(image.size)
            images.append(crop_square(image, self._size))
        if small:
            width, height = min(small, key=min)
            warnings.warn(
                f"images should have sides of at least {self._size} pixels, as the model's have; "
                f"{len(small)} of {len(images)} are enlarged, the smallest from {width}x{height}",
                SafegenWarning,
                stacklevel=3,
            )
        return images

    @property
    def has_twins(self) -> bool:
        """Whether the images are of triplets."""
        return self._triplets is not None

    def index_for(self, sample: EvalSample) -> int:
        """Return the index of an image with a sample's subject, else of any; by its index."""
        same = [i for i, subject in enumerate(self.subjects) if subject == sample.subject]
        candidates = same or range(len(self.subjects))
        return candidates[sample.index % len(candidates)]

    def image_for(self, sample: EvalSample) -> Image.Image:
        """Return the image for a sample."""
        return self.images[self.index_for(sample)]

    def latents_for(self, sample: EvalSample) -> Tensor:
        """Return the latents (c, h, w) of the image for a sample."""
        return self._encode(self.index_for(sample))

    @cached_property
    def latents(self) -> Tensor:
        """Latents (n, c, h, w) of all images."""
        return torch.stack([self._encode(i) for i in range(len(self.images))])

    def _encode(self, index: int) -> Tensor:
        """Return the latents (c, h, w) of an image."""
        if index not in self._encoded:
            pixels = preprocess(self.images[index], self._size)[None]
            self._encoded[index] = self._model.encode_images(pixels).float()[0]
        return self._encoded[index]

    def check_masks(self) -> None:
        """Check that every image of a folder has a mask.

        Raises:
            FileError: one has none.
        """
        for index in () if self._triplets else self._rows:
            mask = _mask_path(self._paths[index])
            if not mask.is_file():
                raise FileError(
                    f"{mask} is missing. Put a mask beside each image: white is redrawn."
                )

    def mask_for(self, sample: EvalSample, *, threshold: int, dilation: int) -> Image.Image:
        """Return the mask of the image for a sample: white is redrawn.

        With triplets, it is where the image differs from its censored twin; with a folder, it is
        the file NAME-mask.png.

        Args:
            sample: the sample.
            threshold: least difference of a color channel (0..255) that counts.
            dilation: pixels by which the mask grows on each side.

        Raises:
            FileError: the mask is missing, has another size than its image, or is empty.
        """
        row = self._rows[self.index_for(sample)]
        if self._triplets:
            name, (image, twin, _) = self._triplets.rows[row].id, self._triplets.images(row)
            if image.size == twin.size:
                mask = difference_mask(image, twin, threshold=threshold)
        else:
            path = self._paths[row]
            name, image, twin = str(path), read_image(path), read_image(_mask_path(path))
            mask = twin.convert("L").point(lambda value: 255 * (value >= 128))
        if image.size != twin.size:
            raise FileError(
                f"the mask of {name} must have the image's size {format_size(image)}, got "
                f"{format_size(twin)}. Resize it."
            )
        mask = crop_square(mask, self._size, Image.Resampling.NEAREST)
        if mask.getbbox() is None:
            raise FileError(f"the mask of {name} must be white where to redraw, got no white pixel")
        return mask.filter(ImageFilter.MaxFilter(2 * dilation + 1)) if dilation else mask


def _open_source(
    concept: Concept, source: Path | None, *, harmless: bool
) -> tuple[Triplets | None, list[Path]]:
    """Return the triplets of a source, or the images of a folder."""
    name = str(source or concept.triplets or "")
    if not name:
        relation, setting = ("without", "harmless") if harmless else ("of", "images")
        raise ConfigError(
            f"images {relation} {concept.name!r} are needed, got none. "
            f"Name a folder of images with --set {setting}=DIR."
        )
    path = Path(name)
    if _is_triplets(path):
        return Triplets.load(name), []
    if not path.is_dir():
        raise FileError(f"{name} must be a folder of images or of triplets. Name another.")
    paths = sorted(
        p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.stem.endswith(MASK)
    )
    if not paths:
        raise ConfigError(
            f"{name} must hold images ({', '.join(SUFFIXES)}), got none. Name another folder."
        )
    return None, paths


def hash_source(path: Path) -> str:
    """Return a SHA-256 over a file, or over the names and contents of a folder's files.

    Of triplets, it is `Triplets.hash`, which covers the images that a CSV file names.

    Raises:
        FileError: there is nothing, or it cannot be read.
    """
    if _is_triplets(path):
        with suppress(FileError):  # a CSV file of something else is a plain file
            return Triplets.load(path).hash
    if not path.is_dir():
        return hashlib.sha256(read_bytes(path, limit=MAX_SOURCE_FILE)).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    digests = [hashlib.sha256(read_bytes(f, limit=MAX_SOURCE_FILE)).hexdigest() for f in files]
    lines = [f"{d} {f.relative_to(path).as_posix()}\n" for d, f in zip(digests, files, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_triplets(path: Path) -> bool:
    """Return whether a source of images is bundled triplets, or a folder or CSV file of them."""
    name = str(path)
    is_bundled = name.partition(":")[0] in TRIPLETS and ":" in name
    return is_bundled or path.suffix.lower() == ".csv" or (path / MANIFEST).is_file()


def _mask_path(path: Path) -> Path:
    """Return the path of an image's mask."""
    return path.with_name(f"{path.stem}{MASK}.png")


def difference_mask(image: Image.Image, twin: Image.Image, *, threshold: int) -> Image.Image:
    """Return a mask of two images of one size: white where a channel differs by `threshold`."""
    difference = np.abs(np.asarray(image, np.int16) - np.asarray(twin, np.int16)).max(-1)
    return Image.fromarray(np.where(difference >= threshold, 255, 0).astype(np.uint8))


def image_name(*images: Image.Image) -> str:
    """Return a file name for images: 16 hexadecimal digits of the SHA-256 of their pixels."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    return digest.hexdigest()[:16]


def variant_names(prefix: str, strengths: Sequence[float]) -> tuple[str, ...]:
    """Return the name of a variant for each strength, such as `strength=0.3`."""
    return tuple(f"{prefix}={strength:g}" for strength in strengths)
