import pytest

from safegen.core.errors import ConfigError, UnknownNameError
from safegen.mini import bundle, captions, world

WORDS = {"skulls": ("skull", "bone", "skelet", "dead"), "fire": ("fire", "flame", "burn", "ablaze")}


@pytest.mark.parametrize("kind", sorted(captions.TEMPLATES))
def test_every_list_has_64_distinct_prompts_and_every_object(kind):
    pairs = captions.list_prompts(kind)
    assert len(set(pairs)) == 64
    assert {name for _, name in pairs} == set(world.OBJECTS)
    assert all(name in text for text, name in pairs)


@pytest.mark.parametrize("concept", sorted(WORDS))
def test_only_explicit_prompts_name_their_concept(concept):
    assert not any(
        word in text
        for text, _ in captions.list_prompts(f"{concept}-innocent")
        for word in WORDS[concept]
    )
    assert all(
        any(word in text for word in WORDS[concept]) for text, _ in captions.list_prompts(concept)
    )


@pytest.mark.parametrize("kind", sorted(captions.TEMPLATES))
def test_held_out_prompts_are_not_in_training(kind):
    measured = {text for text, _ in captions.list_prompts(kind, 192)}
    trained = {text for text, _ in captions.list_prompts(kind, 192, trained=True)}
    assert not measured & trained
    for template in range(len(captions.TEMPLATES[kind])):
        for name in world.OBJECTS:
            if not captions.is_held_out(template, name):
                assert captions.caption(kind, template, name) not in measured


def test_articles_agree_with_their_object():
    assert captions.caption("benign", 0, "owl") == "an owl"
    assert captions.caption("benign", 0, "castle", "at dusk") == "a castle at dusk"


def test_too_many_prompts_or_an_unknown_list_are_refused():
    with pytest.raises(ConfigError, match="got 100000"):
        captions.list_prompts("benign", 100000)
    with pytest.raises(UnknownNameError, match="Did you mean 'skulls'"):
        bundle.prompt_list("skull", 4)
