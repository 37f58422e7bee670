"""Guards beside a textual inversion: every guard reads the tokens that the pipeline encodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safegen.core.errors import ConfigError
from safegen.guards import make_guard
from safegen.guards.core.adapter import PipelineAdapter
from safegen.guards.core.base import Call
from safegen.guards.latent_guard.head import ClipTextFeatures, LatentGuardHead, max_scores
from safegen.guards.safree.projection import concept_projectors
from safegen.models.families.conditioning import Conditioning
from safegen.models.generation import truncated_prompts
from safegen.models.text_encoder import TextEncoderView, text_encoders

TOKEN, VECTORS = "<style>", 3
PROMPT = f"{TOKEN} a red cube on a white table"
SAFREE = {"name": "safree", "phrases": ["a red cube", "red"]}


def add_vectors(pipe, n, width=32, **parts):
    """Load a textual inversion of `n` vectors under `TOKEN`."""
    vectors = torch.randn((n, width), generator=torch.Generator().manual_seed(n))
    pipe.load_textual_inversion(vectors if n > 1 else {TOKEN: vectors[0]}, token=TOKEN, **parts)


@pytest.fixture(scope="module")
def pipe(make_model):
    """Return a tiny pipeline with a textual inversion of three vectors."""
    model = make_model()
    add_vectors(model.pipeline, VECTORS)
    model.pipeline.text_encoder.requires_grad_(False)
    return model


@pytest.fixture(params=["end mark by id", "end mark by greatest id"])
def inverted(request, pipe, monkeypatch):
    """Return the pipeline; Stable Diffusion 1.5's config makes transformers pool the greatest id.

    The greatest id of a prompt is then that of the textual inversion, not that of the end mark.
    """
    if "greatest" in request.param:
        monkeypatch.setattr(pipe.pipeline.text_encoder, "eos_token_id", 2)
    return pipe.pipeline


def ids_of(pipe, prompt):
    """Return the token ids that the pipeline's own `encode_prompt` gives its text encoder."""
    seen = []
    hook = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    PipelineAdapter(pipe).encode([prompt])
    hook.remove()
    return seen[0]


def end_of(pipe, prompt):
    """Return the position of the end mark in the pipeline's ids."""
    return int(ids_of(pipe, prompt)[0].tolist().index(pipe.tokenizer.eos_token_id))


def test_tokens_equal_those_that_the_pipeline_encodes(inverted):
    (view,) = text_encoders(inverted)
    ids, n = view.tokenize(PROMPT)
    assert torch.equal(ids, ids_of(inverted, PROMPT))
    assert n == VECTORS + len(["a", "red", "cube", "on", "a", "white", "table"])
    assert PipelineAdapter(inverted).count_tokens(PROMPT)[0] == n + 2


def test_a_trigger_of_safree_is_the_row_of_its_own_word(inverted):
    """The reference masks each word of the pipeline's own ids, and pools at the end mark."""
    (view,) = text_encoders(inverted)
    (concept,) = concept_projectors([view], SAFREE["phrases"])
    ids = ids_of(inverted, PROMPT)
    end = end_of(inverted, PROMPT)
    distances = []
    for row in range(1, end):
        masked = ids.clone()
        masked[0, row] = 0
        pooled = inverted.text_encoder(masked).last_hidden_state[0, end]
        distances.append(float((pooled - concept @ pooled).norm()))
    d = np.array(distances)
    others = (d.sum() - d) / (len(d) - 1)
    wanted = [int(row) for row in np.flatnonzero(d >= 1.01 * others) + 1]
    assert wanted
    adapter = PipelineAdapter(inverted)
    hook = make_guard(**SAFREE).build(adapter).start(Call(adapter, (PROMPT,), [""], {}))
    before = adapter.encode([PROMPT]).hidden
    after = hook.edit_prompt_embeds(Conditioning(before)).hidden
    moved = [i for i in range(before.shape[1]) if not torch.equal(before[0, i], after[0, i])]
    assert moved == wanted


@pytest.mark.parametrize("name", ["safree", "dual-latent"])
def test_guards_of_tokens_act_beside_an_inversion(inverted, generate, name):
    guard = SAFREE if name == "safree" else {"name": name, "phrases": SAFREE["phrases"], "start": 0}
    base = generate(inverted, None, [PROMPT])
    (output,) = generate(inverted, [guard], [PROMPT])
    assert output.trace.action == "edit"
    assert np.abs(output.image - base[0]).max() > 1e-3


def test_latent_guard_reads_the_expanded_prompt_and_its_windows(inverted):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = LatentGuardHead(32)
    features = ClipTextFeatures(PipelineAdapter(inverted))
    ids = ids_of(inverted, PROMPT)
    end = end_of(inverted, PROMPT)
    hidden = inverted.text_encoder(ids).last_hidden_state
    encoded = features.encode([PROMPT])
    assert torch.allclose(encoded[0, 1:], hidden[0], atol=1e-6)
    assert torch.allclose(encoded[0, 0], hidden[0, end], atol=1e-6)
    long = " ".join([TOKEN] * 20) + " a red cube"  # 20 words, 60 tokens
    rows = [row for part in features.windows(long) for row in part[1:-1]]
    wanted = inverted.tokenizer(
        inverted.maybe_convert_prompt(long, inverted.tokenizer), add_special_tokens=False
    ).input_ids
    assert set(rows) == set(wanted)
    assert features.windows(long)[-1][1:-1] == wanted[-(inverted.tokenizer.model_max_length - 2) :]
    concepts = features.pooled(["red cube"])
    scores = max_scores(head, features, [long, PROMPT], concepts)
    assert scores[1] == pytest.approx(float(head(encoded, concepts).detach()), abs=1e-4)


def test_embedding_probes_of_crops_turn_every_token_of_the_expanded_prompt(inverted):
    adapter = PipelineAdapter(inverted)
    guard = make_guard("crops", "embedding", judge="mini", threshold=1.0, probes=1).build(adapter)
    offsets = guard._embedding_offsets([PROMPT], [torch.Generator().manual_seed(0)], {})
    turned = offsets[0, 0].abs().sum(dim=1).nonzero()[:, 0].tolist()
    assert turned == list(range(1, end_of(inverted, PROMPT)))


def test_lengths_are_counted_with_expanded_tokens(pipe):
    limit = pipe.pipeline.tokenizer.model_max_length
    text = " ".join([TOKEN] * (limit // 2))  # short in words, too long in vectors
    assert len(pipe.pipeline.tokenizer(text).input_ids) <= limit
    assert truncated_prompts(pipe, ["a red cube", text]) == [1]
    with pytest.raises(
        ConfigError, match=rf"must have at most {limit} tokens, got {limit // 2 * 3 + 2}"
    ):
        PipelineAdapter(pipe.pipeline).check_length(text, "text")


def test_each_tokenizer_of_sdxl_expands_by_its_own_vectors(make_xl, generate):
    xl = make_xl()
    add_vectors(xl, 3, text_encoder=xl.text_encoder, tokenizer=xl.tokenizer)
    add_vectors(xl, 2, 24, text_encoder=xl.text_encoder_2, tokenizer=xl.tokenizer_2)
    one, two = text_encoders(xl)
    words = len(PROMPT.split()) - 1
    assert (one.tokenize(PROMPT)[1], two.tokenize(PROMPT)[1]) == (words + 3, words + 2)
    hidden = torch.cat([view.hidden(view.tokenize(PROMPT)[0]) for view in (one, two)], dim=2)
    assert torch.allclose(hidden, PipelineAdapter(xl).encode([PROMPT]).hidden, atol=1e-5)
    (output,) = generate(xl, [SAFREE], [PROMPT])
    assert output.trace.guards[0].action == "edit"
    assert PipelineAdapter(xl).count_tokens(PROMPT)[0] == words + 3 + 2


def test_a_literal_end_mark_hides_no_word_behind_it(make_model):
    """The text encoder pools at the first end mark, but the denoiser reads every token."""
    model = make_model()
    (view,) = text_encoders(model.pipeline)
    end = model.pipeline.tokenizer.eos_token
    ids, n = view.tokenize(f"a {end} red cube")
    other, _ = view.tokenize(f"a {end} blue ball")
    assert n == 4
    assert not torch.equal(view.pooled(ids, [n]), view.pooled(other, [n]))


def test_a_pipeline_without_textual_inversions_is_read_as_it_is(tiny_wan):
    view = TextEncoderView(tiny_wan)
    assert view.expand("a red cube") == "a red cube"
