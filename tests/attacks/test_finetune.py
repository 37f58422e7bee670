"""Fine-tuning: the loss by hand, one training for all patches, and errors of datasets."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.testing import assert_close

from safegen.attacks.finetune import (
    DenoisingObjective,
    FineTuneConfig,
    FineTuneDataset,
    captions_for,
    fine_tune,
)
from safegen.core import registry as tables
from safegen.core.concept import load_concept, prompt_list
from safegen.core.errors import ConfigError, FileError
from safegen.data.triplets.triplets import Triplets
from safegen.edits.training.samples import preprocess
from safegen.edits.uce import UCE
from safegen.judges import load_judge

BRIEF = FineTuneConfig(updates=(1, 3), rank=2, batch=2, lr=1e-2, precision="fp32")


@pytest.fixture(scope="module")
def unsafe(triplets):
    return FineTuneDataset.from_triplets(
        triplets, "unsafe", lambda images: [("", "red cube")] * len(images)
    )


class ZeroDenoiser(torch.nn.Module):
    """Denoiser that predicts zero and records its inputs."""

    def forward(self, x, t, text):
        self.asked = (x, t, text)
        return type("Out", (), {"sample": torch.zeros_like(x)})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_plain_one(make_model, triplets, prediction):
    """The loss of a denoiser that predicts zero is the mean square of the target.

    The target is the noise, or sqrt(a) noise - sqrt(1 - a) z, solved from x_t and z.
    """
    model, silent = make_model(prediction_type=prediction), ZeroDenoiser()
    picture = triplets.images(0)[0]
    problem = DenoisingObjective(
        BRIEF.model_copy(update={"batch": 5}),
        model,
        FineTuneDataset((picture,), (("a red cube",),), "x"),
    )
    loss = problem.training_step(silent, 0, torch.Generator().manual_seed(3), (0, 1))["L"]
    x, t, text = silent.asked
    z, a = (
        model.encode_images(preprocess(picture, model.size)[None]),
        model.alphas_cumprod()[t].view(-1, 1, 1, 1),
    )
    noise = (x - a.sqrt() * z) / (1 - a).sqrt()
    want = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z
    assert_close(loss, want.pow(2).mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-4)
    assert_close(text, model.encode_text(["a red cube"]).expand(5, -1, -1))
    assert len(set(t.tolist())) > 1


def test_two_processes_share_a_batch(tiny_model, unsafe):
    problem = DenoisingObjective(BRIEF.model_copy(update={"batch": 5}), tiny_model, unsafe)

    def part(*share):
        return problem.training_step(
            tiny_model.denoiser, 4, torch.Generator().manual_seed(1), share
        )["L"]

    whole, first, second = part(0, 1), part(0, 2), part(1, 2)
    assert_close(
        torch.stack([first[0], second[0], first[1], second[1], first[2]]),
        whole,
        rtol=1e-4,
        atol=1e-5,
    )


def test_an_intermediate_patch_equals_that_of_a_shorter_training(make_model, unsafe):
    model = make_model()
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    found = fine_tune(model, unsafe, BRIEF)
    assert list(found.patches) == [1, 3]
    assert (
        found.patches[1].hash
        == fine_tune(model, unsafe, BRIEF.model_copy(update={"updates": (1,)})).patches[1].hash
    )
    assert found.patches[1].hash != found.patches[3].hash
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())
    assert [n for n, _ in model.denoiser.named_parameters()] == list(before)
    assert (found.patches[3].metadata.base, found.patches[3].metadata.data) == (
        model.hash,
        unsafe.hash,
    )


def test_the_model_is_fine_tuned_with_its_patches_applied(make_model, unsafe):
    """A LoRA starts at zero, so a tiny learning rate gives the edited model, not the base."""
    model = make_model()
    edit = UCE(erase=("red cube",)).apply(model)
    still = FineTuneConfig(updates=(1,), rank=2, batch=2, lr=1e-12, precision="fp32")
    with edit.apply(model):
        tuned = fine_tune(model, unsafe, still).patches[1]
    assert set(edit.tensors) <= set(tuned.tensors)
    for name, value in edit.tensors.items():
        assert_close(tuned.tensors[name], value, rtol=0, atol=1e-7)
        assert not torch.equal(tuned.tensors[name], model.denoiser.get_parameter(name))


def test_training_lowers_the_loss_of_one_image(make_model, triplets):
    """The mean loss of one image over fixed noise falls."""
    model = make_model()
    dataset = FineTuneDataset((triplets.images(0)[0],), (("",),), "x")
    settings = FineTuneConfig(updates=(60,), rank=8, lr=1e-2, precision="fp32")
    problem = DenoisingObjective(settings.model_copy(update={"batch": 64}), model, dataset)

    def loss():
        with torch.no_grad():
            return float(
                problem.training_step(model.denoiser, 0, torch.Generator().manual_seed(9), (0, 1))[
                    "L"
                ].mean()
            )

    before = loss()
    with fine_tune(model, dataset, settings).patches[60].apply(model):
        assert loss() < 0.9 * before


def test_a_directory_has_captions(tmp_path):
    for name, text in (("b", "a blue\nball "), ("a", "")):
        Image.new("RGB", (40, 40), "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    found = FineTuneDataset.from_folder(tmp_path)
    assert found.captions == (("",), ("a blue ball",))
    assert found.to_dict() == {"images": 2, "captions": 2, "skipped": 0, "hash": found.hash}
    (tmp_path / "b.txt").write_text("a red ball", encoding="utf-8")
    other = FineTuneDataset.from_folder(tmp_path)
    assert other.hash != found.hash
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfa red ball")
    assert (
        FineTuneDataset.from_folder(tmp_path).hash == other.hash
    )  # a byte-order mark is not part of a caption


def test_an_incomplete_dataset_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileError, match=r"is not a folder. Name one with images and a .txt file"):
        FineTuneDataset.from_folder(tmp_path / "no")
    with pytest.raises(FileError, match="has no images"):
        FineTuneDataset.from_folder(tmp_path)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(
        FileError, match=r"a.png has no caption. Write it to .*a.txt; an empty file means none"
    ):
        FineTuneDataset.from_folder(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(FileError, match="is not UTF-8 text"):
        FineTuneDataset.from_folder(tmp_path)


def test_bundled_images_get_captions_of_their_subject_and_no_measured_prompt():
    """Captions name the subject that the judge detects and use prompts of the training split."""
    concept = load_concept("skulls")
    folder = tables.resolve(tables.TRIPLETS, "mini", "triplets source")("skulls")
    found = FineTuneDataset.from_triplets(
        Triplets.load(folder), "unsafe", lambda images: captions_for(concept, "concept", images)
    )
    measured = {
        row.text for lists in concept.lists.values() for name in lists for row in prompt_list(name)
    }
    subjects = {row.text: row.subject for row in prompt_list("mini:skulls-train")}
    assert len(found.images) + found.skipped == 100
    assert found.skipped < 5
    seen = [d.subject for d in load_judge("mini").detect(list(found.images))]
    for subject, texts in zip(seen, found.captions, strict=True):
        assert {subjects[text] for text in texts} == {subject}
        assert not measured & set(texts)


def test_without_caption_lists_images_get_the_concepts_words_or_no_caption():
    concept, pictures = (
        load_concept("skulls").model_copy(update={"tuning": {}}),
        [Image.new("RGB", (64, 64))] * 2,
    )
    assert captions_for(concept, "concept", pictures) == [concept.words] * 2
    assert captions_for(concept, "benign", pictures) == [("",)] * 2


def test_an_image_without_a_caption_is_skipped_and_counted(triplets):
    found = FineTuneDataset.from_triplets(
        triplets, "benign", lambda images: [("a",), *[()] * (len(images) - 1)]
    )
    assert (len(found.images), found.skipped) == (1, 5)
    with pytest.raises(
        FileError, match="no image of the triplets shows a subject that a caption fits"
    ):
        FineTuneDataset.from_triplets(triplets, "benign", lambda images: [()] * len(images))


@pytest.mark.parametrize(
    ("given", "words"),
    [((), "at least 1 item"), ((0,), "rise from 1"), ((5, 5), "rise from 1"), ((9, 2), "got 9, 2")],
)
def test_updates_must_rise(given, words):
    with pytest.raises(ValidationError, match=words):
        FineTuneConfig(updates=given)


def test_a_model_that_predicts_the_sample_is_refused(make_model, unsafe):
    with pytest.raises(ConfigError, match="epsilon or v_prediction, got sample"):
        fine_tune(make_model(prediction_type="sample"), unsafe, BRIEF)
