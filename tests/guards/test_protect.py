"""`safegen.protect`: called as the pipeline is, with patches, guards, or both."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import safegen
from safegen.core.errors import ConfigError, PatchError, SafegenError
from safegen.core.hashing import hash_tensors
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.selectors import select_parameters
from safegen.models.wrapping import model_of
from safegen.patches.patch import BaseMismatchWarning, Patch

PROMPTS = ["a red cube on a white table", "a blue ball in the grass"]
IDLE = [
    {"name": "judge-filter", "judge": "mini", "threshold": 1.0},
    {"name": "sld", "text": "a red cube", "scale": 0.0},
]
"""Guards of images and of guidance that do not act."""
BLOCK = {"name": "prompt-filter", "words": ["cube"]}
REFUSE = {"name": "judge-filter", "judge": "mini", "threshold": 0.2, "labels": ["fire"]}
KINDS = ("text", "img2img", "inpaint", "xl", "xl img2img", "xl inpaint")


@pytest.fixture(scope="module")
def pipelines(make_model, make_xl):
    """Return one pipeline of each kind; the three of a family have the same components."""
    sd, xl = make_model(1).pipeline, make_xl()
    parts = sd.components | {"requires_safety_checker": False}
    built = {
        "text": sd,
        "img2img": diffusers.StableDiffusionImg2ImgPipeline(**parts),
        "inpaint": diffusers.StableDiffusionInpaintPipeline(**parts),
        "xl": xl,
        "xl img2img": diffusers.StableDiffusionXLImg2ImgPipeline(
            **xl.components, add_watermarker=False
        ),
        "xl inpaint": diffusers.StableDiffusionXLInpaintPipeline(
            **xl.components, add_watermarker=False
        ),
    }
    for pipe in built.values():
        pipe.set_progress_bar_config(disable=True)
    return built


def patch_of(pipe):
    """Return a patch that doubles the self-attention of a pipeline."""
    own = dict(pipe.unet.named_parameters())
    names = select_parameters(pipe.unet, "attn1")
    return Patch({k: own[k].detach() * 2 for k in names}, PatchMetadata(base=model_of(pipe).hash))


def options_of(kind, n=2):
    """Return the options of a call with `n` prompts."""
    rng = np.random.default_rng(0)
    options = {
        "num_inference_steps": 3,
        "generator": [torch.Generator().manual_seed(i) for i in range(n)],
    }
    if "img2img" in kind or "inpaint" in kind:
        noise = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        options |= {"image": [Image.fromarray(a) for a in noise], "strength": 0.9}
    if "inpaint" in kind:
        mask = np.zeros((32, 32), dtype=np.uint8)
        mask[:, 16:] = 255
        options |= {"mask_image": [Image.fromarray(mask)] * n, "height": 32, "width": 32}
    return options


def pixels(images):
    return [np.asarray(image).tolist() for image in images]


@pytest.mark.parametrize("what", ["patch", "guards", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_protected_pipeline_is_called_as_the_pipeline_is(pipelines, kind, what):
    """Patched as `Patch.apply` patches; guards that do not act change no bit; all is undone."""
    pipe, guards, patch = pipelines[kind], IDLE if what != "patch" else [], None
    before, state = pipe(PROMPTS, **options_of(kind)), hash_tensors(pipe.unet.state_dict())
    want = before
    if what != "guards":
        patch = patch_of(pipe)
        with patch.apply(pipe):
            want = pipe(PROMPTS, **options_of(kind))
    protected = safegen.protect(pipe, patch=patch, guards=guards)
    found = protected(PROMPTS, **options_of(kind))
    assert type(found) is type(before)
    assert pixels(found.images) == pixels(want.images)
    assert (pixels(found.images) == pixels(before.images)) == (what == "guards")
    if guards:
        assert found.nsfw_content_detected == [False, False]
        assert [trace.action for trace in found.traces] == ["none", "none"]
    assert safegen.unprotect(protected) is pipe
    assert hash_tensors(pipe.unet.state_dict()) == state
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks
    assert pixels(pipe(PROMPTS, **options_of(kind)).images) == pixels(before.images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["one", "all"])
def test_a_withheld_image_is_black_flagged_and_counted(pipelines, kind, how):
    pipe = pipelines[kind]
    guard = BLOCK if how == "one" else {"name": "prompt-filter", "words": ["cube", "ball"]}
    with safegen.protect(pipe, guards=[guard, IDLE[0]]) as protected:
        found = protected(PROMPTS, **options_of(kind))
        assert type(found) is type(pipe(PROMPTS[:1], **options_of(kind, 1)))
        assert found.nsfw_content_detected == [True, how == "all"]
        assert [trace.action for trace in found.traces] == [
            "block",
            "none" if how == "one" else "block",
        ]
        own = pipe(PROMPTS, **options_of(kind)).images
        assert [image.size for image in found.images] == [image.size for image in own]
        assert [image.getbbox() is None for image in found.images] == [True, how == "all"]


@pytest.mark.parametrize("action", ["black", "refuse", "blur"])
def test_an_image_that_a_guard_covers_is_never_the_original(pipelines, action):
    pipe, options = pipelines["text"], options_of("text")
    guard = REFUSE | {"action": action}
    protected = safegen.protect(pipe, guards=[guard])
    found = protected(PROMPTS, **options)
    own = pipe(PROMPTS, **options_of("text")).images
    assert protected.traces == found.traces
    for image, original, flag, trace in zip(
        found.images, own, found.nsfw_content_detected, found.traces, strict=True
    ):
        assert flag == (trace.action != "none")
        assert (image.tobytes() == original.tobytes()) == (not flag)
        assert (image.getbbox() is None) == (flag and action != "blur")
    safegen.unprotect(protected)


@pytest.mark.parametrize("output_type", ["np", "pt"])
@pytest.mark.parametrize("guard", [IDLE[0], BLOCK, REFUSE])
def test_arrays_and_tensors_come_back_as_the_pipeline_gives_them(pipelines, output_type, guard):
    pipe = pipelines["text"]
    own = pipe(PROMPTS, output_type=output_type, **options_of("text")).images
    with safegen.protect(pipe, guards=[guard, IDLE[0]] if guard is BLOCK else [guard]) as protected:
        found = protected(PROMPTS, output_type=output_type, **options_of("text"))
    assert type(found.images) is type(own)
    assert found.images.shape == own.shape
    assert found.images.dtype == own.dtype
    for image, original, flag in zip(found.images, own, found.nsfw_content_detected, strict=True):
        if flag:
            assert float(abs(image).max()) == 0
        else:  # an image alone in its batch is rounded otherwise
            assert float(abs(image - original).max()) <= (1e-4 if guard is BLOCK else 0)
    assert guard is not BLOCK or found.nsfw_content_detected == [True, False]


def test_arguments_are_those_of_the_pipeline(pipelines):
    """By position, one string, several images of one prompt, one generator, tuples as output."""
    pipe = pipelines["text"]
    one = {"num_inference_steps": 3}
    calls = [
        lambda p: p(PROMPTS[0], 32, 40, generator=torch.manual_seed(0), **one),
        lambda p: p(PROMPTS[0], num_images_per_prompt=2, generator=torch.manual_seed(0), **one),
        lambda p: p(PROMPTS[0], negative_prompt="a tree", generator=torch.manual_seed(0), **one),
        lambda p: p(
            prompt=PROMPTS, negative_prompt=["a tree", ""], generator=torch.manual_seed(0), **one
        ),
    ]
    with safegen.protect(pipe, guards=IDLE) as protected:
        for call in calls:
            assert pixels(call(protected).images) == pixels(call(pipe).images)
        images, flags = protected(PROMPTS, return_dict=False, **options_of("text"))
        assert pixels(images) == pixels(pipe(PROMPTS, **options_of("text")).images)
        assert flags == [False, False]
        with pytest.raises(TypeError, match="multiple values"):
            protected(PROMPTS[0], prompt="twice")
    with safegen.protect(pipelines["xl"], guards=IDLE) as protected:
        assert len(protected(PROMPTS, return_dict=False, **options_of("xl"))) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt_embeds": torch.zeros(1, 3, 32)}, "prompt_embeds must not be given with guards"),
        ({"ip_adapter_image": "x"}, "ip_adapter_image must not be given with guards"),
        ({"output_type": "latent"}, "output_type must be 'pil', 'np' or 'pt' with judge-filter"),
        ({"prompt": None}, "prompt must be a text or a list of texts with guards"),
        ({"guidance_scale": 1.0}, "guidance_scale must be > 1 with sld"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be >= 1, got 0"),
    ],
)
def test_what_a_guard_cannot_see_is_refused_in_one_line(pipelines, options, says):
    with safegen.protect(pipelines["text"], guards=IDLE) as protected:
        with pytest.raises(ConfigError) as caught:
            protected(**{"prompt": PROMPTS[0], "num_inference_steps": 1} | options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_attributes_are_those_of_the_pipeline_and_to_keeps_the_protection(pipelines):
    pipe = pipelines["text"]
    protected = safegen.protect(pipe, guards=IDLE)
    assert protected.unet is pipe.unet
    assert protected.scheduler is pipe.scheduler
    assert protected.to("cpu") is protected
    scheduler = copy.deepcopy(pipe.scheduler)
    own, protected.scheduler = pipe.scheduler, scheduler
    assert pipe.scheduler is scheduler
    pipe.scheduler = own
    assert {"unet", "encode_prompt", "traces"} <= set(dir(protected))
    assert repr(protected) == (
        "ProtectedPipeline(StableDiffusionPipeline, guards: judge-filter, sld, patches: 0)"
    )
    with pytest.raises(AttributeError, match="cannot be set"):
        protected.guards = ()
    with pytest.raises(ConfigError, match="protected already"):
        safegen.protect(protected, guards=IDLE)
    safegen.unprotect(protected)
    safegen.unprotect(protected)
    with pytest.raises(ConfigError, match="no longer protected"):
        protected(PROMPTS[0])


def test_a_patch_may_be_a_file_and_several(pipelines, tmp_path):
    pipe = pipelines["text"]
    patch = patch_of(pipe)
    patch.save(tmp_path / "p.safetensors")
    names = select_parameters(pipe.unet, "attn2")
    own = dict(pipe.unet.named_parameters())
    other = Patch({k: own[k].detach() * 3 for k in names}, PatchMetadata(base=model_of(pipe).hash))
    before = {k: own[k].detach().clone() for k in [*patch.names, *names]}
    protected = safegen.protect(pipe, patch=[str(tmp_path / "p.safetensors"), other])
    assert protected.patches == (patch.hash, other.hash)
    assert all(torch.equal(own[k], before[k] * (2 if k in patch.names else 3)) for k in before)
    found = protected(PROMPTS, **options_of("text"))
    assert found.traces == []
    safegen.unprotect(protected)
    assert all(torch.equal(own[k], before[k]) for k in before)


def test_a_guard_that_cannot_run_leaves_no_patch_behind(pipelines):
    pipe = pipelines["text"]
    state = hash_tensors(pipe.unet.state_dict())
    for kwargs, says in (
        ({"guards": ["sld-mx"]}, "Did you mean 'max'"),
        ({"guards": [{"name": "dual-latent", "phrases": ["cube"]}] * 2}, "must be given once"),
        ({"guards": ["safety-checker"]}, "needs weights, and the pipeline has no checker"),
        ({"concept": "skulls"}, "concept must be used by a guard"),
    ):
        with pytest.raises(SafegenError, match=says):
            safegen.protect(pipe, patch=patch_of(pipe), **kwargs)
    with pytest.raises(ConfigError, match="needs a patch or a guard, got neither"):
        safegen.protect(pipe)
    with pytest.raises(ConfigError, match="unprotect takes the result"):
        safegen.unprotect(pipe)
    assert hash_tensors(pipe.unet.state_dict()) == state
    assert model_of(pipe).patches == []


def test_the_safety_checker_of_the_pipeline_is_used_without_weights(
    make_model, checker_in, tmp_path
):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    folder = checker_in(tmp_path / "pipe" / "safety_checker", fits=True)
    (tmp_path / "pipe" / "feature_extractor").mkdir()
    (folder / "preprocessor_config.json").rename(
        tmp_path / "pipe" / "feature_extractor" / "preprocessor_config.json"
    )
    pipe = make_model().pipeline
    pipe.register_modules(safety_checker=StableDiffusionSafetyChecker.from_pretrained(folder))
    protected = safegen.protect(pipe, guards=["safety-checker"])
    pipe.safety_checker = None  # the guard alone decides
    found = protected(PROMPTS[0], num_inference_steps=1)
    assert found.nsfw_content_detected == [True]
    assert found.images[0].getbbox() is None


def test_flags_of_the_pipelines_own_checker_stay(make_model):
    pipe = make_model().pipeline
    pipe.run_safety_checker = lambda image, device, dtype: (image * 0 - 1, [True] * len(image))
    with safegen.protect(pipe, guards=[IDLE[1]]) as protected:
        found = protected(PROMPTS, num_inference_steps=1)
    assert found.nsfw_content_detected == [True, True]


def test_a_patch_goes_on_a_pipeline_and_its_unet(make_model):
    pipe = make_model(2).pipeline
    patch = patch_of(pipe)
    own = dict(pipe.unet.named_parameters())
    before = {k: own[k].detach().clone() for k in patch.names}
    for target in (pipe, pipe.unet, diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)):
        with patch.apply(target) as applied:
            assert applied.names == patch.names
            assert all(torch.equal(own[k], before[k] * 2) for k in before)
            assert [p.hash for p in model_of(pipe).patches] == [patch.hash]
        assert all(torch.equal(own[k], before[k]) for k in before)
    other = make_model(3).pipeline
    with pytest.warns(BaseMismatchWarning, match="was made on weights"):
        patch.apply(other).undo()
    with pytest.raises(PatchError, match="does not fit the model 'StableDiffusionPipeline'"):
        Patch({"nowhere": torch.zeros(1)}).apply(pipe)
    with pytest.raises(ConfigError, match="or that network, got int"):
        patch.apply(3)


def test_a_model_and_its_pipeline_know_the_same_patches(make_model):
    model = make_model(2)
    own = dict(model.denoiser.named_parameters())
    patch = Patch({k: own[k].detach() * 2 for k in select_parameters(model.denoiser, "attn1")})
    with patch.apply(model):
        assert model.patches
        assert [p.hash for p in model.patches] == [p.hash for p in model_of(model.pipeline).patches]
    assert model_of(model.pipeline) is model_of(model.denoiser)


def test_a_patch_is_undone_beside_a_lora_of_the_user(make_model):
    peft = pytest.importorskip("peft")
    pipe = make_model(2).pipeline
    patch, base = patch_of(pipe), model_of(pipe).hash
    weights = {k: dict(pipe.unet.named_parameters())[k].detach().clone() for k in patch.names}
    applied = patch.apply(pipe)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    applied.undo()
    state = {k.replace(".base_layer.", "."): v for k, v in pipe.unet.named_parameters()}
    assert all(torch.equal(state[k], weights[k]) for k in weights)
    assert model_of(pipe).hash_denoiser() == base


def test_a_loaded_pipeline_is_a_model(make_model, make_xl):
    pipe = make_model(2).pipeline
    model = safegen.load(pipe)
    assert model.pipeline is pipe
    assert model.name == "StableDiffusionPipeline"
    assert safegen.load(pipe) is model
    config = safegen.GenerationConfig(num_inference_steps=1, seed_mode="torch")
    (image,) = safegen.generate(model, PROMPTS[0], config)
    (want,) = pipe(
        PROMPTS[0], num_inference_steps=1, guidance_scale=5.0, generator=torch.manual_seed(0)
    ).images
    assert image.tobytes() == want.tobytes()
    redraw = safegen.load(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    assert redraw is model
    assert type(safegen.load(make_xl()).pipeline).__name__ == "StableDiffusionXLPipeline"
    with pytest.raises(ConfigError, match="must not be given with a pipeline"):
        safegen.load(pipe, dtype="bf16")
    with pytest.raises(
        ConfigError, match="must be a name, a path or a diffusers pipeline, got int"
    ):
        safegen.load(3)
    with pytest.raises(ConfigError, match=r"must be a Stable Diffusion 1\.x to 3\.x, an"):
        safegen.load(diffusers.DDPMPipeline(unet=pipe.unet, scheduler=pipe.scheduler))


def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[2] / "docs" / "how-to" / "use-in-diffusers.md"
    monkeypatch.chdir(tmp_path)
    patch_of(safegen.load("mini").pipeline).save("patch.safetensors")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    scope = {}
    exec("\n".join(blocks), scope)
    with Image.open("castle.png") as image:
        assert image.size == (64, 64)
    assert capsys.readouterr().out.startswith("[")
    assert [image.size for image in scope["images"]] == [(96, 64)] * 2
    assert scope["model"].patches == []


def test_what_is_no_pipeline_is_refused_in_one_line(make_model, pipelines):
    for value in (make_model(2), "mini", None, pipelines["text"].unet):
        with pytest.raises(ConfigError, match="pipe must be a diffusers pipeline, got"):
            safegen.protect(value, guards=[BLOCK])
    with pytest.raises(ConfigError, match="got neither"):
        safegen.protect(pipelines["text"], guards=None)
    with pytest.raises(ConfigError, match="a guard must be a name, a table or settings, got int"):
        safegen.protect(pipelines["text"], guards=[3])
    with pytest.raises(ConfigError, match=r"judge is required\. A concept gives it"):
        safegen.protect(pipelines["text"], guards=["judge-filter"])
    safe = safegen.protect(pipelines["text"], guards=[BLOCK])
    with pytest.raises(ConfigError, match="a list of texts, got NoneType in it"):
        safe(["a red cube", None], num_inference_steps=1)


@pytest.mark.parametrize("how", ["undone", "replaced", "copied"])
def test_a_call_without_its_patches_is_refused(make_model, how):
    pipe = make_model(2).pipeline
    safe, unet = safegen.protect(pipe, patch=patch_of(pipe)), pipe.unet
    if how == "undone":
        model_of(pipe).applied_patches[0].undo()
    elif how == "replaced":
        with pytest.raises(AttributeError, match="unet cannot be set"):
            safe.unet = make_model(3).pipeline.unet
        pipe.unet = make_model(3).pipeline.unet
    else:
        safegen.unprotect(copy.copy(safe))
    with pytest.raises(ConfigError, match="patches must stay on the pipeline"):
        safe(PROMPTS[0], num_inference_steps=1)
    pipe.unet = unet
    safegen.unprotect(safe)


def test_a_loaded_pipeline_is_its_own_beside_others_of_its_unet(make_model):
    pipe = make_model(2).pipeline
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    config = safegen.GenerationConfig(num_inference_steps=2)
    with patch_of(other).apply(other):
        model = safegen.load(pipe)
        assert model.pipeline is pipe
        assert model.hash != model.hash_denoiser()
        assert len(model.patches) == 1
        assert safegen.generate(safegen.load(other), PROMPTS[0], config)
    assert model.patches == []
    assert model.hash == model.hash_denoiser()
