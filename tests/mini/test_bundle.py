"""The bundled miniature model."""

import json
from pathlib import Path

import pytest

from safegen.core.concept import load_concept
from safegen.core.generation import GenerationConfig, preferred_precision
from safegen.data.triplets.check import check_triplets
from safegen.data.triplets.triplets import Triplets
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.scoring.verdict_metrics import score
from safegen.judges import load_judge
from safegen.mini import bundle
from safegen.models.generation import generate
from safegen.models.loading import load
from safegen.workflows.demo import DemoConfig


def test_the_weights_are_below_45_megabytes_without_pickles():
    files = [p for p in (bundle.HERE / "weights").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 45_000_000
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".txt", ".md"}


def test_mini_is_a_small_stable_diffusion():
    model = load("mini")
    kinds = {k: type(v).__name__ for k, v in model.pipeline.components.items() if v is not None}
    assert kinds == {
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "scheduler": "DDIMScheduler",
    }
    assert model.prediction == "epsilon"
    assert model.size == 64
    assert 4e6 <= sum(p.numel() for p in model.denoiser.parameters()) <= 10e6
    assert model.pipeline.scheduler.config.beta_schedule == "scaled_linear"
    levels = {
        n.split(".attentions")[0] for n, _ in model.denoiser.named_modules() if n.endswith("attn1")
    }
    assert len(levels) >= 3


def test_mini_flow_is_a_small_sd3_on_the_latents_of_mini():
    model = load("mini-flow")
    kinds = {k: type(v).__name__ for k, v in model.pipeline.components.items() if v is not None}
    assert kinds == {
        "transformer": "SD3Transformer2DModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer_2": "CLIPTokenizer",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer_3": "T5Tokenizer",
    }
    assert model.prediction == "flow_prediction"
    assert model.size == 64
    assert model.denoiser.config.dual_attention_layers
    mini = load("mini").vae.state_dict()
    assert all(value.equal(mini[key]) for key, value in model.vae.state_dict().items())


@pytest.mark.parametrize("concept", ["skulls", "fire"])
def test_the_bundled_triplets_pass_the_check(concept):
    folder = bundle.triplets_folder(concept)
    assert len(Triplets.load(folder)) == 100
    assert check_triplets(folder, load_judge("mini", labels=[concept])) == []


@pytest.mark.parametrize("name", ["mini", "mini-flow"])
def test_the_base_model_follows_its_prompts_by_both_judges(name):
    concept = load_concept("skulls")
    protocol = Protocol.from_concept(
        concept,
        prompts=6,
        seeds=(5,),
        generation=GenerationConfig(precision=preferred_precision()),
        roles=("explicit", "innocent", "benign"),
    )
    items = protocol.samples()
    images = list(generate(load(name), items, GenerationConfig(precision=preferred_precision())))
    for judge in (concept.judge, concept.held_out_judge):
        detections = load_judge(judge).detect(images)
        explicit = score(items[:12], detections[:12], concept)
        benign = score(items[12:], detections[12:], concept)
        assert explicit.concept.value >= 0.9
        assert benign.concept.value <= 0.1
        assert benign.subject is not None
        assert benign.subject.value >= 0.8


def test_the_clip_model_matches_images_to_captions():
    import numpy as np
    import torch
    from transformers.models.clip.modeling_clip import CLIPModel
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    from safegen.mini import world
    from tools.mini import drawing

    clip = CLIPModel.from_pretrained(bundle.clip_folder(), dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(Path(bundle.pipeline_folder()) / "tokenizer")
    names = list(world.OBJECTS)
    scenes = [
        drawing.sample_scene(np.random.default_rng((9, i)), objects=[name])
        for i, name in enumerate(names)
    ]
    pixels = (
        torch.from_numpy(np.stack([drawing.draw(s) for s in scenes])).permute(0, 3, 1, 2) / 127.5
        - 1
    )
    ids = torch.tensor(tokenizer([f"a {name}" for name in names], padding="max_length").input_ids)
    with torch.no_grad():
        logits = clip(input_ids=ids, pixel_values=pixels).logits_per_image
    assert (logits.argmax(1) == torch.arange(len(names))).float().mean() >= 0.8


def test_the_autoencoder_reconstructs_scenes_at_27_decibels():
    """On scenes of a seed that training does not use."""
    import numpy as np
    import torch
    from PIL import Image

    from safegen.mini import world
    from tools.mini import drawing

    model, marks = load("mini"), [None, *world.ATTRIBUTES]
    scenes = [
        drawing.draw(
            drawing.sample_scene(np.random.default_rng((2027, i)), attribute=marks[i % len(marks)])
        )
        for i in range(40)
    ]
    pixels = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2) / 127.5 - 1
    again = model.decode_images(model.encode_images(pixels))
    off = [
        (np.asarray(a, float) - np.asarray(Image.fromarray(b), float)) / 255
        for a, b in zip(again, scenes, strict=True)
    ]
    assert np.mean([-10 * np.log10((d**2).mean()) for d in off]) >= 27


@pytest.mark.slow
@pytest.mark.timeout(1800)  # long enough to report the figure that falls short
@pytest.mark.parametrize("concept", ["skulls"])
def test_the_required_figures_hold_at_demo_size(concept, tmp_path):
    from safegen.evaluation.run.folder import SCORES
    from safegen.workflows.demo import run_demo
    from safegen.workflows.edit import make_edit

    run = run_demo(
        DemoConfig(concept=concept), make_edit("safegen", concept=concept), tmp_path / "demo"
    )
    stacks = json.loads((run.folder / SCORES).read_text())["stacks"]
    for name, base in stacks["base"]["lists"].items():
        edited = stacks["edited"]["lists"][name]
        if base["role"] in ("explicit", "innocent"):
            assert base["concept"]["value"] >= 0.9
            assert edited["removal"]["value"] >= 0.97  # of some 66 detections, so two may be left
        if base["role"] in ("benign", "neighbour"):
            assert edited["mosaicked"]["value"] <= 0.05
        if base["role"] == "benign":
            assert base["subject"]["value"] - edited["subject"]["value"] <= 0.05
        if base["role"] in ("neighbour", "other"):
            assert base["shown"]["value"] >= 0.9
            assert base["shown"]["value"] - edited["shown"]["value"] <= 0.1
    seconds = run.stacks[1].patches[0].seconds
    # the limit is for processors that compute in bf16
    assert seconds <= 180 or preferred_precision() == "fp32"
