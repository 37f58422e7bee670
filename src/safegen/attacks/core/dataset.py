"""Images that an attack learns from, with captions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from PIL import Image

from safegen.core.concept import Concept, prompt_list
from safegen.core.errors import ConfigError, FileError
from safegen.data.images import read_image
from safegen.data.triplets.triplets import Triplets, read_role
from safegen.judges import load_concept_judge

Data = Literal["benign", "concept"]
"""What a fine-tune learns: harmless images, as an ordinary user's, or images of the concept."""
Captioner = Callable[[Sequence[Image.Image]], Sequence[tuple[str, ...]]]
"""Returns the captions that each image may be trained with."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class FineTuneDataset:
    """Images to fine-tune on with the captions that each may be trained with."""

    images: tuple[Image.Image, ...]
    captions: tuple[tuple[str, ...], ...]
    """Captions of each image; a draw takes one of them."""
    hash: str
    """SHA-256 over images and captions."""
    skipped: int = 0
    """Number of images without a caption, which are left out."""

    @classmethod
    def from_triplets(
        cls, triplets: Triplets, role: Literal["unsafe", "benign"], caption: Captioner
    ) -> Self:
        """Return one role of the triplets as a dataset.

        Args:
            triplets: the triplets, which carry no text.
            role: which of their images.
            caption: returns captions for the images; one without any is skipped.

        Raises:
            FileError: an image is missing or changed, or none has a caption.
        """
        images = [read_role(triplets.folder, row, role) for row in triplets.rows]
        digests = [getattr(row.sha256, role) for row in triplets.rows]
        rows = [row for row in zip(images, caption(images), digests, strict=True) if row[1]]
        if not rows:
            raise FileError(
                "no image of the triplets shows a subject that a caption fits. "
                "Name captioned images with --set images=DIR."
            )
        used, captions, hashes = zip(*rows, strict=True)
        return cls(used, captions, _digest(hashes, captions), len(images) - len(rows))

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Return the images of a folder with their captions, `cat.png` beside `cat.txt`.

        Raises:
            FileError: there is no such folder or no image in it, a caption is missing, or a file
                cannot be read.
        """
        if not folder.is_dir():
            raise FileError(
                f"{folder} is not a folder. Name one with images and a .txt file with the caption "
                "beside each."
            )
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise FileError(f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)})")
        captions = []
        for path in paths:
            file = path.with_suffix(".txt")
            if not file.is_file():
                raise FileError(
                    f"{path.name} has no caption. Write it to {file}; an empty file means none."
                )
            try:
                captions.append((" ".join(file.read_text(encoding="utf-8-sig").split()),))
            except UnicodeDecodeError as error:
                raise FileError(f"{file} is not UTF-8 text: {error}") from error
        hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]
        images = tuple(read_image(p) for p in paths)
        return cls(images, tuple(captions), _digest(hashes, captions))

    def to_dict(self) -> dict[str, Any]:
        """Return the dataset's sizes and hash; no caption, which may be unsafe."""
        return {
            "images": len(self.images),
            "captions": len({text for row in self.captions for text in row}),
            "skipped": self.skipped,
            "hash": self.hash,
        }


def captions_for(
    concept: Concept, data: Data, images: Sequence[Image.Image]
) -> list[tuple[str, ...]]:
    """Return captions for images that have none.

    The captions of an image are the prompts of the concept's `tuning` lists for the subject that
    its judge sees. A concept without such lists gives its words to its own images and the blank
    caption to harmless ones. That is a weaker attack: a bare word need not be how a user asks for
    such an image, and blank captions train the unconditional branch of guidance.
    """
    if data not in concept.tuning:
        return [concept.words if data == "concept" else ("",)] * len(images)
    prompts: dict[str | None, tuple[str, ...]] = {}
    for row in (row for name in concept.tuning[data] for row in prompt_list(name)):
        prompts[row.subject] = (*prompts.get(row.subject, ()), row.text)
    judge = load_concept_judge(concept)
    subjects = [detections.subject for detections in judge.detect(list(images))]
    return [prompts.get(subject, ()) if subject else () for subject in subjects]


def load_dataset(
    concept: Concept, data: Data, *, triplets: Path | None = None, images: Path | None = None
) -> FineTuneDataset:
    """Return the images to fine-tune on.

    Args:
        concept: its bundled triplets are used when neither `triplets` nor `images` is given.
        data: which side of the triplets.
        triplets: folder or CSV file of triplets.
        images: folder of images with captions.

    Raises:
        ConfigError: both are given, or neither and the concept bundles none.
        FileError: they cannot be read.
    """
    if triplets and images:
        raise ConfigError("give either triplets or images, got both")
    if images:
        return FineTuneDataset.from_folder(images)
    source = triplets or concept.triplets
    if not source:
        raise ConfigError(
            f"concept {concept.name!r} has no bundled triplets. "
            "Name some with --set triplets=DIR, or captioned images with --set images=DIR."
        )
    return FineTuneDataset.from_triplets(
        Triplets.load(source),
        "benign" if data == "benign" else "unsafe",
        lambda images: captions_for(concept, data, images),
    )


def _digest(hashes: Sequence[str], captions: Sequence[Sequence[str]]) -> str:
    rows = zip(hashes, captions, strict=True)
    return hashlib.sha256("".join(f"{h} {list(c)!r}\n" for h, c in rows).encode()).hexdigest()
