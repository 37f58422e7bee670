"""The cache of text encoders' outputs: it saves passes, changes no byte, and is never stale."""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from safegen.core.generation import GenerationConfig, Sample
from safegen.guards import read_guard
from safegen.models.families.pipeline_specs import encode_texts
from safegen.models.generation import generate
from safegen.models.patched_weights import pipeline_weights
from safegen.models.text_cache import TextCache
from safegen.models.text_encoder import replaced_embeddings, replaced_ids, text_encoder_names
from safegen.models.textual_inversion import added_words
from safegen.patches.patch import Patch
from safegen.stack import Stack
from safegen.stack_loader import StackLoader
from tiny import build_model

TEXTS = ["a red cube", "a blue ball in the grass"]
CONFIG = GenerationConfig(num_inference_steps=1, guidance_scale=2.0)
SAMPLES = [Sample(prompt=text, seed=i) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def shared():
    return build_model("sd1")


@pytest.fixture
def model():
    """Return a tiny model that a test may change."""
    return build_model("sd1")


@contextmanager
def passes(model):
    """Yield a list that gets the name of a text encoder at each of its passes."""
    seen, encoders = [], {n: getattr(model.pipeline, n) for n in text_encoder_names(model.pipeline)}
    names = {id(encoder): name for name, encoder in encoders.items()}

    def count(forward):
        @functools.wraps(forward)
        def counted(self, *args, **kwargs):
            if id(self) in names:  # not one inside another
                seen.append(names[id(self)])
            return forward(self, *args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(encoder) for encoder in encoders.values()}:
            patch.setattr(kind, "forward", count(kind.forward))
        yield seen


def encode(model, cache=None, texts=TEXTS):
    with cache.attached(model.pipeline) if cache else nullcontext():
        return encode_texts(model.pipeline, texts).hidden


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_images_are_equal_and_a_second_call_reads_no_text(family):
    model, cache = build_model(family), TextCache()
    plain = generate(model, SAMPLES, CONFIG)
    with passes(model) as seen:
        for expected in (True, False):
            with cache.attached(model.pipeline):
                drawn = generate(model, SAMPLES, CONFIG)
            assert all(map(np.array_equal, map(np.asarray, plain), map(np.asarray, drawn)))
            assert bool(seen) is expected
            seen.clear()
    assert "forward" not in vars(model.pipeline.text_encoder)


def ids(model, n):
    return torch.full((n, model.pipeline.tokenizer.model_max_length), 5)


def scale_in_place(model):
    with torch.no_grad():
        next(model.pipeline.text_encoder.parameters()).mul_(2)


def scale_data(model):
    next(model.pipeline.text_encoder.parameters()).data.mul_(2)


def exchange_words_in_data(model):
    """Exchange the embeddings of all words for those of others: a sum alone would be equal."""
    table = model.pipeline.text_encoder.get_input_embeddings().weight.data
    table.copy_(table.flip(0).clone())


def replace_parameter(model):
    layer = model.pipeline.text_encoder.get_input_embeddings()
    layer.weight = torch.nn.Parameter(2 * layer.weight.detach(), requires_grad=False)


def replace_layer(model):
    layer = copy.deepcopy(model.pipeline.text_encoder.get_input_embeddings())
    layer.weight.data.mul_(2)
    model.pipeline.text_encoder.set_input_embeddings(layer)


def replace_forward(model):
    encoder = model.pipeline.text_encoder
    forward = encoder.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    encoder.forward = doubled


def turn_on_dropout(model):
    model.pipeline.text_encoder.train()


@pytest.mark.parametrize(
    "change",
    [
        scale_in_place,
        scale_data,
        exchange_words_in_data,
        replace_parameter,
        replace_layer,
        replace_forward,
        turn_on_dropout,
    ],
)
def test_a_changed_encoder_is_read_anew(model, change):
    cache = TextCache()
    before = encode(model, cache)
    change(model)
    assert torch.equal(encode(model, cache), encode(model))
    assert change is turn_on_dropout or not torch.equal(encode(model, cache), before)


@pytest.mark.parametrize(
    "context",
    [
        lambda m: added_words(m, {"<word>": [torch.ones(1, 32)]}),
        lambda m: replaced_embeddings(m.pipeline.text_encoder, lambda ids, x: 2 * x),
        lambda m: replaced_ids(m.pipeline.text_encoder, ids(m, 2)),
        lambda m: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["learned word", "embeddings", "ids", "autocast"],
)
def test_what_a_context_changes_is_seen_inside_it_and_not_after(shared, context):
    texts, cache = ["a <word> cube", "a cube"], TextCache()
    before = encode(shared, cache, texts)
    with context(shared):
        inside = encode(shared, texts=texts)
        for _ in range(2):
            assert torch.equal(encode(shared, cache, texts), inside)
    assert not torch.equal(inside.float(), before)
    assert torch.equal(encode(shared, cache, texts), before)


def test_gradients_flow_as_without_a_cache(shared):
    cache = TextCache()
    encode(shared, cache)
    with (
        cache.attached(shared.pipeline),
        replaced_embeddings(shared.pipeline.text_encoder, lambda ids, x: x.requires_grad_()),
    ):
        assert encode_texts(shared.pipeline, TEXTS, with_gradient=True).hidden.requires_grad


def test_what_a_caller_writes_into_an_output_is_not_kept(shared):
    cache = TextCache()
    before = encode(shared, cache).clone()
    encode(shared, cache).zero_()
    assert torch.equal(encode(shared, cache), before)


def test_a_copy_of_an_encoder_inside_the_block_is_an_encoder_of_its_own(shared):
    with TextCache().attached(shared.pipeline), torch.no_grad():
        own = copy.deepcopy(shared.pipeline.text_encoder)
        before = shared.pipeline.text_encoder(ids(shared, 1))[0]
        next(own.parameters()).mul_(2)
        assert not torch.equal(own(ids(shared, 1))[0], before)
        assert torch.equal(shared.pipeline.text_encoder(ids(shared, 1))[0], before)


def test_memory_is_bounded_and_the_batch_used_longest_ago_goes_first(shared):
    one = TextCache()
    encode(shared, one, TEXTS[:1])
    cache = TextCache(max_bytes=2 * one.nbytes)
    with passes(shared) as seen:
        for text in ("a", "b", "a", "c", "a"):
            encode(shared, cache, [text])
            assert cache.nbytes <= 2 * one.nbytes
        assert len(seen) == 3
        encode(shared, cache, ["b"])
        assert len(seen) == 4
        encode(shared, TextCache(max_bytes=1), ["a"])  # too large to keep
    cache.clear()
    assert cache.nbytes == 0


def test_stacks_on_one_model_share_texts_unless_an_encoder_is_patched(model, tmp_path):
    weights = pipeline_weights(model.pipeline)
    names = {"unet": "conv_in.weight", "text": next(n for n in weights if "token_embedding" in n)}
    for file, name in names.items():
        Patch({name: 1.5 * weights[name].detach()}).save(tmp_path / f"{file}.safetensors")
    guards = (read_guard({"name": "safree", "phrases": ["a red cube"]}),)
    loader, counts, images = StackLoader(model=model), [], []
    for file in ("", "unet", "text", ""):
        patches = (tmp_path / f"{file}.safetensors",) if file else ()
        stack = Stack(name="s", model=model.name, patches=patches, guards=guards)
        with loader.open(stack) as loaded, passes(model) as seen:
            images.append(np.stack(loaded.generate_images(SAMPLES, CONFIG)))
            counts.append(len(seen))
            fresh = replace(loaded, text_cache=None).generate_images(SAMPLES, CONFIG)
            assert np.array_equal(np.stack(fresh), images[-1])
    first = counts[0]
    assert first > 0
    assert counts == [first, 0, first, first]
    assert np.array_equal(images[0], images[3])
    assert not np.array_equal(images[0], images[2])
