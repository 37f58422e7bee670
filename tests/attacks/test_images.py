"""Images that an attacker has: what is read, refused, cut and masked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from safegen.attacks.core.images import ConceptImages, difference_mask
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError, SafegenWarning
from safegen.data.triplets.triplets import Triplets
from safegen.edits.training.samples import preprocess

SKULLS = load_concept("skulls")
UNSAFE, _, BENIGN = Triplets.load("mini:skulls").images(0)


@pytest.fixture(scope="module")
def model(loader):
    return loader.model("mini")[0]


@pytest.fixture
def folder(tmp_path):
    """Return a function that fills a folder with images."""

    def fill(**images):
        for name, image in images.items():
            image.save(tmp_path / f"{name.replace('_mask', '-mask')}.png")
        return tmp_path

    return fill


def test_each_prompt_has_images_of_its_subject_and_their_latents(model, benign_samples):
    bundled, named = ConceptImages(model, SKULLS, None), Path("mini:skulls")
    assert ConceptImages(model, SKULLS, named).images == bundled.images
    for sample in benign_samples:
        index = bundled.index_for(sample)
        assert bundled.subjects[index] == sample.subject
        pixels = preprocess(bundled.images[index], model.size)[None]
        assert torch.equal(bundled.latents_for(sample), model.encode_images(pixels)[0].float())
        later = sample.model_copy(update={"index": sample.index + 1})
        assert bundled.index_for(later) != index, "another image for another attack"
        unknown = sample.model_copy(update={"subject": "nothing"})
        assert bundled.image_for(unknown) in bundled.images
    harmless = ConceptImages(model, SKULLS, None, harmless=True)
    assert harmless.images[0] == BENIGN


def test_larger_images_are_cut_and_smaller_ones_are_enlarged_with_a_warning(model, folder):
    wide = Image.new("RGB", (320, 128), "gray")
    wide.paste(UNSAFE.resize((128, 128)), (96, 0))
    (image,) = ConceptImages(model, SKULLS, folder(a=wide)).images
    assert image.size == (64, 64)
    assert np.abs(np.asarray(image, int) - np.asarray(UNSAFE)).mean() < 8
    small = folder(b=UNSAFE.resize((48, 48)))
    with pytest.warns(SafegenWarning, match="1 of 2 are enlarged, the smallest from 48x48"):
        assert len(ConceptImages(model, SKULLS, small).images) == 2
    with pytest.raises(FileError, match="32 pixels, got 16x64"):
        ConceptImages(model, SKULLS, folder(c=Image.new("RGB", (16, 64))))


def test_images_with_the_wrong_verdict_are_left_out_with_a_warning(model, folder):
    both = folder(a=UNSAFE, b=BENIGN)
    for harmless, image in ((False, UNSAFE), (True, BENIGN)):
        with pytest.warns(SafegenWarning, match="1 of 2 are left out"):
            assert ConceptImages(model, SKULLS, both, harmless=harmless).images == [image]
    (both / "a.png").unlink()
    with pytest.raises(ConfigError, match="images must show 'skulls' to the judge 'mini', got no"):
        ConceptImages(model, SKULLS, both)


def test_sources_without_images_are_refused(model, folder, tmp_path):
    with pytest.raises(ConfigError, match="must hold images"):
        ConceptImages(model, SKULLS, tmp_path)
    with pytest.raises(ConfigError, match="must hold images"):
        ConceptImages(model, SKULLS, folder(a_mask=UNSAFE))
    with pytest.raises(FileError, match="must be a folder of images or of triplets"):
        ConceptImages(model, SKULLS, tmp_path / "none")
    with pytest.raises(ConfigError, match="images of 'skulls' are needed"):
        ConceptImages(model, SKULLS.model_copy(update={"triplets": None}), None)
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(FileError, match=r"a\.png is not an image"):
        ConceptImages(model, SKULLS, tmp_path)


def test_masks_of_triplets_are_where_the_twins_differ(model, benign_samples):
    images, sample = ConceptImages(model, SKULLS, None), benign_samples[0]
    unsafe, censored, _ = Triplets.load("mini:skulls").images(images.index_for(sample))
    differs = np.abs(np.asarray(unsafe, int) - np.asarray(censored)).max(-1)
    exact = np.asarray(images.mask_for(sample, threshold=8, dilation=0))
    assert np.array_equal(exact == 255, differs >= 8)
    grown = np.asarray(images.mask_for(sample, threshold=8, dilation=2))
    padded = np.pad(exact, 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
    assert np.array_equal(grown, windows.max((-1, -2)))
    assert difference_mask(unsafe, unsafe, threshold=1).getbbox() is None


def test_masks_of_a_folder_are_files_beside_the_images(model, benign_samples, folder):
    half = Image.new("L", (128, 128))
    half.paste(200, (0, 0, 64, 128))
    images = ConceptImages(model, SKULLS, folder(a=UNSAFE.resize((128, 128)), a_mask=half))
    images.check_masks()
    mask = np.asarray(images.mask_for(benign_samples[0], threshold=8, dilation=0))
    assert (mask[:, :32] == 255).all()
    assert not mask[:, 32:].any()
    for wrong, message in ((half.resize((64, 64)), "got 64x64"), (half.point([0] * 256), "no whi")):
        folder(a_mask=wrong)
        with pytest.raises(FileError, match=message):
            images.mask_for(benign_samples[0], threshold=8, dilation=0)
    (folder() / "a-mask.png").unlink()
    with pytest.raises(FileError, match=r"a-mask\.png is missing"):
        images.check_masks()
