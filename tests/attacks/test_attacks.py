"""What single attacks find."""

from __future__ import annotations

import pytest
import torch

from safegen.attacks.core.text import concept_pairs, explicit_text
from safegen.attacks.search.text_space import TextSpace
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError

SKULLS = load_concept("skulls")


def test_pairs_and_explicit_texts_have_the_subject(benign_samples):
    text, benign, subject = concept_pairs(SKULLS)[0]
    assert subject in text
    assert subject in benign
    assert "skull" in text
    assert "skull" not in benign
    sample = benign_samples[0]
    assert "skull" in explicit_text(SKULLS, sample)
    assert sample.subject in explicit_text(SKULLS, sample)
    nameless = SKULLS.model_copy(update={"tuning": {}, "words": (), "captions": ()})
    with pytest.raises(ConfigError, match="words"):
        explicit_text(nameless, sample)
    with pytest.raises(ConfigError, match="tuning"):
        concept_pairs(nameless)


def test_text_space_rows_are_those_of_the_tokenizer(loader):
    space = TextSpace(loader.model("mini")[0])
    ids = space.tokenize(["a castle covered in skulls"])
    own = space.own_tokens("a castle covered in skulls")[None]
    assert torch.equal(space.rows(own), ids)
    assert space.decode(own) == ["a castle covered in skulls"]


def test_texts_of_whole_words_are_read_back(loader):
    space = TextSpace(loader.model("mini")[0])
    words = torch.tensor(space.whole_words)
    assert 0 < len(words) < len(space.vocabulary)
    rows = words[torch.randint(len(words), (50, 8), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(space.tokenize(space.decode(rows)), space.rows(rows))
