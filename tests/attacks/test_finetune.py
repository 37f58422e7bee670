"""Fine-tuning: the loss by hand, one training for all patches, and errors of datasets."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from safegen.attacks.core import finetune
from safegen.attacks.core.dataset import FineTuneDataset, captions_for
from safegen.attacks.core.finetune import DenoisingObjective, fine_tune, patch_path, updates_done
from safegen.attacks.relearn import Relearn
from safegen.core import registry as tables
from safegen.core.concept import load_concept, prompt_list
from safegen.core.errors import ConfigError, DivergedError, FileError
from safegen.data.triplets.triplets import Triplets
from safegen.edits.training.samples import preprocess
from safegen.edits.uce import UCE
from safegen.judges import load_judge
from safegen.patches.patch import Patch

BRIEF = Relearn(images_per_update=2, lr=1e-2, precision="fp32").training


def patches_of(files):
    return {updates: Patch.load(path) for updates, path in files.items()}


@pytest.fixture(scope="module")
def unsafe(triplets):
    return FineTuneDataset.from_triplets(
        triplets, "unsafe", lambda images: [("", "red cube")] * len(images)
    )


def record_inputs(network):
    """Return a list that gets the inputs of each call of a network."""
    inputs = []
    network.register_forward_pre_hook(lambda _, __, named: inputs.append(named), with_kwargs=True)
    return inputs


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_plain_one(make_model, triplets, prediction):
    """The loss of a denoiser that predicts zero is the mean square of the target.

    The target is the noise, or sqrt(a) noise - sqrt(1 - a) z, solved from x_t and z.
    """
    model, picture = make_model(prediction_type=prediction), triplets.images(0)[0]
    inputs = record_inputs(model.denoiser)
    for parameter in model.denoiser.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    problem = DenoisingObjective(
        model, FineTuneDataset((picture,), (("a red cube",),), "x"), batch=5
    )
    loss = problem.training_step(model.denoiser, 0, torch.Generator().manual_seed(3), (0, 1))["L"]
    x, t, text = (inputs[0][k] for k in ("sample", "timestep", "encoder_hidden_states"))
    z, a = (
        model.encode_images(preprocess(picture, model.size)[None]),
        model.pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1),
    )
    noise = (x - a.sqrt() * z) / (1 - a).sqrt()
    want = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z
    assert_close(loss, want.pow(2).mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-4)
    assert_close(text, model.encode_text(["a red cube"]).expand(5).hidden)
    assert len(set(t.tolist())) > 1


def test_two_processes_share_a_batch(tiny_model, unsafe):
    problem = DenoisingObjective(tiny_model, unsafe, batch=5)

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


@pytest.mark.parametrize("rank", [2, None])
def test_an_intermediate_patch_equals_that_of_a_shorter_training(
    make_model, unsafe, tmp_path, rank
):
    model = make_model()
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    found = patches_of(fine_tune(model, unsafe, (1, 3), BRIEF, folder=tmp_path / "a", rank=rank))
    assert list(found) == [1, 3]
    short = patches_of(fine_tune(model, unsafe, (1,), BRIEF, folder=tmp_path / "b", rank=rank))
    assert found[1].hash == short[1].hash
    assert found[1].hash != found[3].hash
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())
    assert [n for n, _ in model.denoiser.named_parameters()] == list(before)
    metadata = found[3].metadata
    assert (metadata.base, metadata.data) == (model.hash, unsafe.hash)
    assert (metadata.updates, metadata.settings["rank"]) == (3, rank)


def test_full_fine_tuning_changes_every_weight_that_the_selector_names(
    make_model, unsafe, tmp_path
):
    model = make_model()
    options = {"rank": None, "selector": "all", "folder": tmp_path / "a"}
    patch = Patch.load(fine_tune(model, unsafe, (2,), BRIEF, **options)[2])
    parameters = dict(model.denoiser.named_parameters())
    assert patch.names == set(parameters)
    unchanged = [n for n, value in patch.tensors.items() if torch.equal(value, parameters[n])]
    assert len(unchanged) < 0.1 * len(parameters)


def test_the_model_is_fine_tuned_with_its_patches_applied(make_model, unsafe, tmp_path):
    """A LoRA starts at zero, so a tiny learning rate gives the edited model, not the base."""
    model = make_model()
    edit = UCE(erase=("red cube",)).apply(model)
    still = BRIEF.model_copy(update={"lr": 1e-12})
    with edit.apply(model):
        (path,) = fine_tune(model, unsafe, (1,), still, folder=tmp_path / "a", rank=2).values()
    tuned = Patch.load(path)
    assert set(edit.tensors) <= set(tuned.tensors)
    for name, value in edit.tensors.items():
        assert_close(tuned.tensors[name], value, rtol=0, atol=1e-7)
        assert not torch.equal(tuned.tensors[name], model.denoiser.get_parameter(name))


def test_training_lowers_the_loss_of_one_image(make_model, triplets, tmp_path):
    """The mean loss of one image over fixed noise falls."""
    model = make_model()
    dataset = FineTuneDataset((triplets.images(0)[0],), (("",),), "x")
    training = Relearn(lr=1e-2, images_per_update=4, precision="fp32").training
    problem = DenoisingObjective(model, dataset, batch=64)

    def loss():
        with torch.no_grad():
            return float(
                problem.training_step(model.denoiser, 0, torch.Generator().manual_seed(9), (0, 1))[
                    "L"
                ].mean()
            )

    before = loss()
    files = fine_tune(model, dataset, (30,), training, folder=tmp_path / "a", rank=8)
    with Patch.load(files[30]).apply(model):
        assert loss() < 0.9 * before


def test_a_callback_ends_the_fine_tune_with_a_patch_of_that_update(make_model, unsafe, tmp_path):
    model, folder, asked = make_model(), tmp_path / "a", []

    def stop(done, total, row):
        asked.append((done, total))
        return done == 2

    files = fine_tune(model, unsafe, (1, 5), BRIEF, folder=folder, rank=2, callback=stop)
    assert list(files) == [1, 2]
    assert asked == [(1, 5), (2, 5)]
    assert updates_done(folder) == 2
    again = fine_tune(model, unsafe, (1, 5), BRIEF, folder=folder, rank=2, callback=stop)
    assert again == files, "a finished fine-tune is not repeated"
    assert len(asked) == 2
    short = fine_tune(model, unsafe, (2,), BRIEF, folder=tmp_path / "b", rank=2)
    assert Patch.load(files[2]).hash == Patch.load(short[2]).hash


def test_a_killed_fine_tune_resumes_to_equal_patches(make_model, unsafe, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "CHECKPOINT_EVERY", 2)
    model, folder = make_model(), tmp_path / "a"

    def die(done, total, row):
        if done == 4:
            raise RuntimeError("pulled the plug")
        return False

    options = {"folder": folder, "rank": 2}
    with pytest.raises(RuntimeError):
        fine_tune(model, unsafe, (3, 5), BRIEF, callback=die, **options)
    assert updates_done(folder) == 2, "the last checkpoint"
    assert patch_path(folder, 3).exists()
    done = []
    resumed = fine_tune(
        model, unsafe, (3, 5), BRIEF, callback=lambda n, *_: done.append(n), **options
    )
    assert done == [3, 4, 5]
    unbroken = fine_tune(model, unsafe, (3, 5), BRIEF, folder=tmp_path / "b", rank=2)
    for updates, patch in patches_of(unbroken).items():
        assert Patch.load(resumed[updates]).hash == patch.hash


def test_a_fine_tune_that_diverges_leaves_no_checkpoint(make_model, unsafe, tmp_path):
    wild = BRIEF.model_copy(update={"lr": 1e9})
    with pytest.raises(DivergedError, match="Lower lr"):
        fine_tune(make_model(), unsafe, (60,), wild, folder=tmp_path / "a", rank=2)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.jsonl"))


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


def test_a_model_that_predicts_the_sample_is_refused(make_model, unsafe, tmp_path):
    with pytest.raises(ConfigError, match="flow_prediction, got sample"):
        fine_tune(make_model(prediction_type="sample"), unsafe, (1,), BRIEF, folder=tmp_path / "a")
    assert not (tmp_path / "a").exists()
