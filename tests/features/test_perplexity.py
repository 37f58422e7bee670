"""Perplexity of texts under a tiny causal language model."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from safegen.core.errors import FileError
from safegen.features.perplexity import CausalPerplexity

WORDS = ["<s>", "a", "castle", "by", "the", "sea", "owl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a GPT-2 with random weights and seven words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("gpt2")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(WORDS),
            n_positions=8,
            n_embd=8,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        GPT2LMHeadModel(config).save_pretrained(path)
    return path


def test_perplexity_is_exp_of_the_loss_of_transformers(folder):
    model = CausalPerplexity(folder)
    ids = torch.tensor([[0, 1, 2, 3, 4, 5]])
    network = GPT2LMHeadModel.from_pretrained(folder).eval()
    loss = network(ids, labels=ids).loss.item()
    value, none, cut = model.perplexities(["a castle by the sea", "", "a castle " * 50])
    assert value == pytest.approx(math.exp(loss), rel=1e-5)
    assert none is None, "an empty text has no perplexity"
    assert cut > 1, "a text that is longer than the model's positions is cut"
    assert model.id.startswith(f"{folder.name}:")


def test_a_model_without_preference_has_the_perplexity_of_its_vocabulary(folder, tmp_path):
    network = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    network.save_pretrained(tmp_path)
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (value,) = CausalPerplexity(tmp_path).perplexities(["owl castle"])
    assert value == pytest.approx(len(WORDS))


def test_a_folder_that_is_no_language_model_is_refused(tmp_path):
    with pytest.raises(FileError, match="there is no folder"):
        CausalPerplexity(tmp_path / "none")
    with pytest.raises(FileError, match="cannot be read as a causal language model"):
        CausalPerplexity(tmp_path)
