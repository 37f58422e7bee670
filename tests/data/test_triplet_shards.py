"""Triplets made in shards are those of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from red import RedJudge, safe_image, unsafe_image

from safegen.core.errors import ConfigError, FileError
from safegen.data.shards import Shard
from safegen.data.triplets.make import make_triplets
from safegen.data.triplets.shards import CARD, DETECTIONS, make_triplet_shard, merge_triplets

LABELS = {"labels": ["red"]}


@pytest.fixture
def many(images: Path) -> Path:
    """Return a folder of 30 unsafe images, one twice, one too small, and of 20 benign ones."""
    for i in range(3, 30):
        unsafe_image(i, patch=(20, 24, 30 + i % 5, 40)).save(images / "unsafe" / f"u{i:02d}.png")
    for i in range(2, 20):
        safe_image(10 + i).save(images / "benign" / f"b{i:02d}.png")
    shutil.copy(images / "unsafe" / "u03.png", images / "unsafe" / "v.png")
    safe_image(99, (4, 4)).save(images / "unsafe" / "small.png")
    return images


def shards(folder: Path, count: int, judge: RedJudge | None = None) -> list[Path]:
    parts = [folder / f"part-{i}" for i in range(1, count + 1)]
    for i, part in enumerate(parts, 1):
        common = (folder / "unsafe", folder / "benign", judge or RedJudge(), part)
        make_triplet_shard(*common, Shard(index=i, count=count), **LABELS)
    return parts


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("count", [1, 3])
def test_merged_shards_are_the_triplets_of_one_process(many: Path, count: int) -> None:
    common = (many / "unsafe", many / "benign")
    judge = RedJudge(shrink=2)  # boxes too small: images are censored again
    whole = make_triplets(*common, judge, many / "whole", **LABELS)
    looks, judge.looks = judge.looks, 0
    parts = shards(many, count, judge)
    assert judge.looks == looks  # no image is judged twice
    merged = merge_triplets([*parts[::-1], parts[0]], *common, many / "merged")
    assert merged.skipped == whole.skipped
    assert contents(many / "merged") == contents(many / "whole")
    if count > 1:
        sizes = [len((part / DETECTIONS).read_text().splitlines()) for part in parts]
        assert sum(size > 0 for size in sizes) > 1


def test_a_shard_resumes_and_judges_nothing_twice(images: Path) -> None:
    (part,) = shards(images, 1)
    whole = contents(part)
    lines = (part / DETECTIONS).read_bytes()
    (part / DETECTIONS).write_bytes(lines[: len(lines) // 2])
    card = json.loads((part / CARD).read_text()) | {"finished": False}
    (part / CARD).write_text(json.dumps(card))
    with pytest.raises(FileError, match=r"every shard must be finished, but not: 1/1\. Finish"):
        merge_triplets([part], images / "unsafe", images / "benign", images / "out")
    shards(images, 1)
    assert {k: sorted(v.splitlines()) for k, v in contents(part).items()} == {
        k: sorted(v.splitlines()) for k, v in whole.items()
    }
    judge = RedJudge()
    shards(images, 1, judge)
    assert judge.looks == 0
    with pytest.raises(FileError, match="is shard 1/1, or was made with other settings"):
        shards(images, 2)


def test_a_merge_leaves_a_shard_in_which_another_process_writes_as_it_is(images: Path) -> None:
    (part,) = shards(images, 1)
    other = shutil.copytree(part, images / "other")
    lines = (other / DETECTIONS).read_bytes()[:-9]
    (other / DETECTIONS).write_bytes(lines)
    merge_triplets([part, other], images / "unsafe", images / "benign", images / "out")
    assert (other / DETECTIONS).read_bytes() == lines


def test_a_message_tells_how_many_more_shards_are_missing(images: Path) -> None:
    (part,) = shards(images, 1)
    card = json.loads((part / CARD).read_text()) | {"shard": "1/10"}
    (part / CARD).write_text(json.dumps(card))
    with pytest.raises(FileError, match=r"but not: 2/10, .*, 9/10 and 1 more\. Finish"):
        merge_triplets([part], images / "unsafe", images / "benign", images / "out")


def test_shards_that_do_not_make_a_whole_are_refused(images: Path) -> None:
    parts, folders = shards(images, 2), (images / "unsafe", images / "benign")
    with pytest.raises(FileError, match="but not: 2/2"):
        merge_triplets(parts[:1], *folders, images / "out")
    unsafe_image(77).save(folders[0] / "new.png")
    with pytest.raises(FileError, match="every shard must be finished and of the same images"):
        merge_triplets(parts, *folders, images / "out")
    (folders[0] / "new.png").unlink()
    for path, change, kind, message in (
        (DETECTIONS, ("0.9", "0.8"), FileError, "parts must agree, got other detections of"),
        (CARD, ('"threshold": 0.5', '"threshold": 0.6'), ConfigError, "must have equal settings"),
    ):
        for i, part in enumerate(parts):
            copy = shutil.copytree(part, images / f"copy-{path}-{i}")
            (copy / path).write_text((copy / path).read_text().replace(*change))
        with pytest.raises(kind, match=message):
            merge_triplets(
                [*parts, *(images / f"copy-{path}-{i}" for i in range(2))], *folders, images / "out"
            )
    with pytest.raises(FileError, match="must be a shard of triplets"):
        merge_triplets([images], *folders, images / "out")
    assert not (images / "out").exists()
