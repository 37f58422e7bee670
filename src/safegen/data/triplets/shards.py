"""Triplets made in shards: each judges a part of the images, and a merge writes the triplets."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO

from PIL import Image
from pydantic import BaseModel, ConfigDict

from safegen.core.documents import parse_record, read_bytes, read_record
from safegen.core.errors import ConfigError, FileError
from safegen.core.files import atomic_write, claim_folder, is_unfinished, writing
from safegen.core.progress import ProgressCallback, no_progress, track
from safegen.core.registry import expand_labels
from safegen.core.settings import JsonObject
from safegen.data.shards import Shard
from safegen.data.triplets.censor import Censor
from safegen.data.triplets.make import DEFAULT_CENSOR, MakeResult, censor_until_safe, make_triplets
from safegen.data.triplets.select import DetectionRule, folder_sources, judge_sources
from safegen.judges.base import Detections, Judge
from safegen.judges.images import ImageInputs, list_images

CARD, DETECTIONS = "shard.json", "detections.jsonl"
MAX_NAMES = 8
"""Most shards that a message names."""
OTHER = "it belongs to another shard"
"""Why a shard leaves an image unjudged."""


class TripletShard(BaseModel):
    """Card of a shard of triplets (`shard.json`): what decides its detections."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    shard: Shard
    """The shard."""
    judge: str
    """Id of the judge."""
    label_space: tuple[str, ...]
    """Every label that the judge can detect."""
    labels: tuple[str, ...]
    """Labels of the judge that mean unsafe."""
    threshold: float
    """Lowest score of a detection that counts."""
    censor: JsonObject
    """Settings of the cover."""
    finished: bool = False
    """Whether every image of the shard is judged."""

    @property
    def common(self) -> dict[str, object]:
        """What all shards have."""
        return self.model_dump(mode="json", exclude={"shard", "finished"})


class ImageDetections(BaseModel):
    """Detections in one image (`detections.jsonl`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    image: str
    """SHA-256 of the size and the pixels."""
    detections: Detections
    """What the judge detected."""


class RecordedJudge:
    """Judge that reads its detections from records, and asks another judge for those it lacks."""

    def __init__(
        self, card: TripletShard, known: dict[str, Detections], detect: Callable[..., None] | None
    ) -> None:
        """Take the detections that are known.

        Args:
            card: id, labels and threshold of the judge.
            known: detections by the hash of the image.
            detect: called with images and their hashes, to add their detections to `known`; None
                if no judge can be asked.
        """
        self.id, self.label_space = card.judge, card.label_space
        self.labels, self.threshold = card.labels, card.threshold
        self._known, self._detect = known, detect

    def detect(self, images: ImageInputs) -> list[Detections]:
        """Return the detections of each image, in order.

        Raises:
            FileError: an image is not recorded, and there is no judge.
        """
        pictures = [image for image in list_images(images) if isinstance(image, Image.Image)]
        digests = [hash_pixels(image) for image in pictures]
        if not self._known.keys() >= set(digests):
            if self._detect is None:
                raise FileError(
                    "every shard must be finished and of the same images, but one is not judged. "
                    "Finish each shard with its command, and merge all again"
                )
            self._detect(pictures, digests)
        return [self._known[digest] for digest in digests]


class OwnBatches:
    """Judge that judges the batches of one shard; the images of others are unjudged."""

    def __init__(self, judge: Judge, shard: Shard) -> None:
        self.id, self.label_space = judge.id, judge.label_space
        self.labels, self.threshold = judge.labels, judge.threshold
        self._judge, self._shard = judge, shard

    def detect(self, images: ImageInputs) -> list[Detections]:
        """Return the detections of each image of a batch, in order."""
        pictures = [image for image in list_images(images) if isinstance(image, Image.Image)]
        names = "".join(map(hash_pixels, pictures))
        number = int.from_bytes(sha256(names.encode()).digest()[:8], "big")
        if number % self._shard.count != self._shard.index - 1:
            return [Detections((), unjudged=OTHER)] * len(pictures)
        return self._judge.detect(pictures)


def hash_pixels(image: Image.Image) -> str:
    """Return the SHA-256 of the size and the pixels of an image."""
    return sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def make_triplet_shard(
    unsafe: Path,
    benign: Path | None,
    judge: Judge,
    output: Path,
    shard: Shard,
    censor: Censor = DEFAULT_CENSOR,
    *,
    labels: Collection[str],
    threshold: float = 0.5,
    progress: ProgressCallback = no_progress,
) -> int:
    """Judge the images of one shard, censor the unsafe ones, and return how many were judged.

    Detections are written, and no image; `merge_triplets` makes the triplets of them. Batches of
    images belong to a shard by a hash of their pixels. The same call resumes an interrupted one.

    Args:
        unsafe: folder of unsafe images.
        benign: folder of benign images; None to use the images of `unsafe` that are judged safe.
        judge: detector of what to censor.
        output: folder of the shard, new or of an earlier call.
        shard: the shard.
        censor: settings of the cover.
        labels: labels of the judge that mean the concept is in the image.
        threshold: least score of a detection that counts.
        progress: called with (description, done, total).

    Raises:
        FileError: `output` holds something else or another shard, or cannot be written, or a folder
            is empty.
        ConfigError: there are no labels, or the threshold is out of range.
    """
    rule = DetectionRule(judge, frozenset(expand_labels(labels)), threshold)
    sources = [(str(folder), folder_sources(folder)) for folder in (unsafe, benign) if folder]
    card = TripletShard(
        shard=shard,
        judge=judge.id,
        label_space=tuple(judge.label_space),
        labels=tuple(sorted(rule.labels)),
        threshold=threshold,
        censor=censor.model_dump(mode="json"),
    )
    with claim_folder(output), writing(output):
        _claim_card(output, card)
        known = _read_detections(output, repair=True)
        with (output / DETECTIONS).open("ab") as file:
            recorder = RecordedJudge(card, known, _recorder(judge, known, file))
            own = DetectionRule(OwnBatches(recorder, shard), rule.labels, threshold)
            found, *_ = [judge_sources(*part, own, progress) for part in sources]
            recorded = DetectionRule(recorder, rule.labels, threshold)
            for image in track(found.unsafe, "censoring", progress):
                censor_until_safe(image, image.source.read(), recorded, censor)
        _write_card(output, card.model_copy(update={"finished": True}))
    return len(known)


def merge_triplets(
    parts: Sequence[Path],
    unsafe: Path,
    benign: Path | None,
    output: Path,
    *,
    progress: ProgressCallback = no_progress,
) -> MakeResult:
    """Make triplets from the detections of all shards; they are those of one process.

    Args:
        parts: folders of all shards. A shard may be given twice, if its detections are equal.
        unsafe: folder of unsafe images that the shards judged.
        benign: folder of benign images that the shards judged; None if they had none.
        output: folder to write; it must not exist.
        progress: called with (description, done, total).

    Raises:
        FileError: a folder is no shard, two contradict each other, or a shard is missing or not
            finished. Others are those of `make_triplets`.
        ConfigError: the shards had different settings, or are of different numbers of shards.
    """
    cards = {part: _read_card(part) for part in parts}
    if not cards:
        raise ConfigError("shards to merge must be at least one, got none. Name their folders")
    (first, card), *others = cards.items()
    for part, other in others:
        if other.common != card.common or other.shard.count != card.shard.count:
            raise ConfigError(
                f"shards to merge must have equal settings, got others in {first} and {part}. "
                "Leave one of them out"
            )
    finished = {other.shard.index for other in cards.values() if other.finished}
    if missing := [i for i in range(1, card.shard.count + 1) if i not in finished]:
        names = ", ".join(f"{i}/{card.shard.count}" for i in missing[:MAX_NAMES])
        more = f" and {len(missing) - MAX_NAMES} more" if len(missing) > MAX_NAMES else ""
        raise FileError(
            f"every shard must be finished, but not: {names}{more}. "
            "Finish each with its command and --shard, and merge all again"
        )
    known: dict[str, Detections] = {}
    for part in cards:
        for digest, detections in _read_detections(part).items():
            if known.setdefault(digest, detections) != detections:
                raise FileError(
                    f"parts must agree, got other detections of {digest[:16]} in {part}. "
                    "Leave one of the parts out"
                )
    return make_triplets(
        unsafe,
        benign,
        RecordedJudge(card, known, None),
        output,
        Censor.model_validate(card.censor),
        labels=card.labels,
        threshold=card.threshold,
        progress=progress,
    )


def _recorder(judge: Judge, known: dict[str, Detections], file: IO[bytes]) -> Callable[..., None]:
    def detect(images: Sequence[Image.Image], digests: Sequence[str]) -> None:
        new: Mapping[str, Detections] = dict(zip(digests, judge.detect(images), strict=True))
        lines = [ImageDetections(image=key, detections=value) for key, value in new.items()]
        file.write("".join(line.model_dump_json() + "\n" for line in lines).encode())
        file.flush()
        known.update(new)

    return detect


def _claim_card(output: Path, card: TripletShard) -> None:
    """Write the card of a new shard, or check that of an earlier call."""
    if not (output / CARD).exists():
        if any(not is_unfinished(path) for path in output.iterdir()):
            raise FileError(f"{output} already exists. Name another folder with --out.")
        _write_card(output, card)
        return
    old = _read_card(output)
    if old.shard != card.shard or old.common != card.common:
        raise FileError(
            f"{output} is shard {old.shard}, or was made with other settings. "
            "Name another folder with --out."
        )


def _write_card(output: Path, card: TripletShard) -> None:
    with atomic_write(output / CARD, replace=True) as temporary:
        temporary.write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _read_card(part: Path) -> TripletShard:
    if not (part / CARD).exists():
        raise FileError(f"{part} must be a shard of triplets, but has no {CARD}. Leave it out")
    return read_record(TripletShard, part / CARD)


def _read_detections(part: Path, *, repair: bool = False) -> dict[str, Detections]:
    """Return the detections of a shard by image without a torn last line, which `repair` removes.

    Without it nothing is written: another process may be at work in the folder.
    """
    path = part / DETECTIONS
    if not path.exists():
        return {}
    data = read_bytes(path)
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) < len(data):
        os.truncate(path, len(whole))
    lines = whole.splitlines()
    records = [
        parse_record(ImageDetections, line, f"{path}:{number}")
        for number, line in enumerate(lines, 1)
    ]
    return {record.image: record.detections for record in records}
