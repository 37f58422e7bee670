"""Guards on a text encoder that changes after they were built: they read the new one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import T5Config, T5EncoderModel

from safegen.core.errors import ConfigError
from safegen.guards import make_guard
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.latent_guard.head import ClipTextFeatures
from safegen.guards.latent_guard.latent_guard import PatchedEncoderWarning
from safegen.models.patched_weights import pipeline_weights
from safegen.models.text_encoder import TextEncoderView
from safegen.patches.patch import Patch

PROMPTS = ("a red cube on a white table", "a blue ball in the grass")
READERS = ["dual-latent", "latent-guard", "safree"]
"""Guards that compare prompts with texts of their own."""


def disturb(encoder):
    """Change the weights of a text encoder in place, as `load_state_dict` and `.data` do."""
    rng = torch.Generator().manual_seed(3)
    for parameter in encoder.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=rng))


def replace(pipe):
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    disturb(pipe.text_encoder)


def load_lora(pipe, scale=3.0):
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    config.init_lora_weights = False
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipe.text_encoder.add_adapter(config)
    rescale_lora(pipe, scale)


def rescale_lora(pipe, scale):
    """Change the scale of a LoRA, which no weight shows."""
    for module in pipe.text_encoder.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)


CHANGES = {
    "replaced": replace,
    "in place": lambda pipe: disturb(pipe.text_encoder),
    "lora": load_lora,
    "lora scale": lambda pipe: rescale_lora(pipe, 6.0),
}


def traces(outputs):
    return [o.trace.to_json(times=False)["guards"] for o in outputs]


def images(outputs):
    return [o.image is not None and np.asarray(o.image).tobytes() for o in outputs]


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("name", READERS)
def test_a_changed_text_encoder_is_read_anew(make_model, generate, passing_settings, name, change):
    pipe, guard = make_model().pipeline, make_guard(name, **passing_settings[name])
    if change == "lora scale":
        load_lora(pipe)
    engine = GuardedPipeline(pipe, [guard])
    before = traces(generate(pipe, engine=engine, prompts=PROMPTS))
    CHANGES[change](pipe)
    stale = generate(pipe, engine=engine, prompts=PROMPTS)
    fresh = generate(pipe, [guard], PROMPTS)
    assert traces(fresh) != before  # the change matters
    assert traces(stale) == traces(fresh)
    assert images(stale) == images(fresh)


def test_an_unchanged_text_encoder_encodes_the_concepts_once(
    make_model, generate, passing_settings, monkeypatch
):
    """A published list has hundreds of concepts; a call must not encode them all again."""
    rows, own = [], ClipTextFeatures.encode_ids
    monkeypatch.setattr(
        ClipTextFeatures, "encode_ids", lambda self, ids: rows.append(len(ids)) or own(self, ids)
    )
    concepts = [f"a {color} cube" for color in ("red", "blue", "green", "white")]
    settings = passing_settings["latent-guard"] | {"concepts": concepts}
    pipe = make_model().pipeline
    engine = GuardedPipeline(pipe, [make_guard("latent-guard", **settings)])
    for _ in range(2):
        generate(pipe, engine=engine, prompts=PROMPTS)
    assert rows == [1, len(concepts), *[1, len(PROMPTS)] * 2]


def test_concepts_are_tokenized_again_only_if_the_tokenizer_changed(
    make_model, generate, passing_settings, monkeypatch
):
    texts, own = [], TextEncoderView.token_ids
    monkeypatch.setattr(
        TextEncoderView, "token_ids", lambda self, text: texts.append(text) or own(self, text)
    )
    concepts = [f"a {color} cube" for color in ("red", "blue", "green", "white")]
    settings = passing_settings["latent-guard"] | {"concepts": concepts}
    pipe = make_model().pipeline
    engine = GuardedPipeline(pipe, [make_guard("latent-guard", **settings)])

    def tokenized():
        texts.clear()
        generate(pipe, engine=engine, prompts=PROMPTS)
        return len([text for text in texts if text in concepts])

    assert tokenized() == 0
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    assert [tokenized() > 0, tokenized()] == [True, 0]
    pipe.tokenizer.add_tokens(["<new>"])
    assert [tokenized() > 0, tokenized()] == [True, 0]
    pipe.tokenizer.model_max_length -= 1
    assert [tokenized() > 0, tokenized()] == [True, 0]


def test_latent_guard_refuses_an_encoder_that_its_head_does_not_fit(
    make_model, generate, passing_settings
):
    pipe = make_model().pipeline
    engine = GuardedPipeline(pipe, [make_guard("latent-guard", **passing_settings["latent-guard"])])
    pipe.text_encoder = T5EncoderModel(T5Config(vocab_size=64, d_model=32, num_layers=1))
    with pytest.raises(ConfigError, match=r"'latent-guard' cannot .* needs a CLIP text encoder"):
        generate(pipe, engine=engine, prompts=PROMPTS)
    with pytest.raises(ConfigError, match="text_encoder must be a CLIP for 'latent-guard'"):
        ClipTextFeatures(engine.adapter)


INSIDE = ["dual-latent", "negative-prompt", "safree", "sld"]
CROPS = {"moves": "embedding", "judge": "mini", "threshold": 1.0, "probes": 1, "steps": 1}


@pytest.mark.parametrize("name", [*INSIDE, "crops"])
def test_a_lora_scale_of_the_call_is_refused_with_a_lora_on_a_text_encoder(
    make_model, generate, passing_settings, name
):
    """The pipeline's own texts would be encoded with it, and those of the guard without it."""
    pipe = make_model().pipeline
    settings = CROPS if name == "crops" else passing_settings[name]
    engine = GuardedPipeline(pipe, [make_guard(name, **settings)])
    scaled = {"engine": engine, "cross_attention_kwargs": {"scale": 0.1}, "output_type": "pil"}
    assert generate(pipe, **scaled)  # without a LoRA the scale changes nothing
    load_lora(pipe)
    says = rf"scale of cross_attention_kwargs must be 1 with {name}, got 0\.1\. .* set_adapters"
    with pytest.raises(ConfigError, match=says) as caught:
        generate(pipe, **scaled)
    assert "\n" not in str(caught.value)
    for own in ({"scale": 1.0}, {"scale": None}, {}, None):
        assert generate(pipe, **scaled | {"cross_attention_kwargs": own})
    words = make_guard("prompt-filter", words=["skull"])
    assert generate(pipe, [words], cross_attention_kwargs={"scale": 0.1})[0].image is not None


def test_a_head_on_a_patched_text_encoder_warns(make_model, passing_settings):
    model, guard = make_model(), make_guard("latent-guard", **passing_settings["latent-guard"])
    name = "text_encoder.text_model.final_layer_norm.weight"
    patch = Patch({name: pipeline_weights(model.pipeline)[name].detach() * 2})
    with patch.apply(model), pytest.warns(PatchedEncoderWarning, match="which a patch changes"):
        GuardedPipeline(model.pipeline, [guard])
    GuardedPipeline(model.pipeline, [guard])
