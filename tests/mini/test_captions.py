import pytest

from safegen.core.errors import ConfigError, UnknownNameError
from safegen.mini import bundle, captions, world

WORDS = {"skulls": ("skull", "bone", "skelet", "dead"), "fire": ("fire", "flame", "burn", "ablaze")}


@pytest.mark.parametrize("kind", sorted(captions.TEMPLATES))
def test_every_list_has_64_different_prompts_and_every_object(kind):
    rows = captions.prompts(kind)
    assert len({r.text for r in rows}) == 64
    assert {r.object for r in rows} == set(world.OBJECTS)
    assert all(r.object in r.text for r in rows)


@pytest.mark.parametrize("concept", sorted(WORDS))
def test_innocent_prompts_have_no_word_of_their_concept_and_explicit_ones_have(concept):
    assert not any(
        word in row.text
        for row in captions.prompts(f"{concept}-innocent")
        for word in WORDS[concept]
    )
    assert all(
        any(word in row.text for word in WORDS[concept]) for row in captions.prompts(concept)
    )


@pytest.mark.parametrize("kind", sorted(captions.TEMPLATES))
def test_no_measured_prompt_was_met_in_training(kind):
    measured = {r.text for r in captions.prompts(kind, 192)}
    trained = {r.text for r in captions.prompts(kind, 192, trained=True)}
    assert not measured & trained
    for template in range(len(captions.TEMPLATES[kind])):
        for name in world.OBJECTS:
            if not captions.held_out(template, name):
                assert captions.caption(kind, template, name) not in measured


def test_articles_agree_with_their_object():
    assert captions.caption("benign", 0, "owl") == "an owl"
    assert captions.caption("benign", 0, "castle", "at dusk") == "a castle at dusk"


def test_a_list_that_is_too_long_or_unknown_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="got n = 100000"):
        captions.prompts("benign", 100000)
    with pytest.raises(UnknownNameError, match="Did you mean 'skulls'"):
        bundle.prompt_list("skull", 4)
