import pytest

from safegen.core.concept import prompt_list
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


@pytest.mark.parametrize("concept", sorted(captions.LADDERS))
def test_every_rung_of_a_ladder_has_each_object_and_no_caption_of_training(concept):
    trained = {
        captions.caption(kind, template, name, background)
        for kind, templates in captions.TEMPLATES.items()
        for template in range(len(templates))
        for name in world.OBJECTS
        for background in (None, *world.BACKGROUNDS)
    }
    lengths = []
    for rung in captions.RUNGS:
        rows = prompt_list(f"mini:{concept}-ladder-{rung}")
        texts = {row.text for row in rows}
        assert len(texts) == 64
        assert {row.subject for row in rows[:32]} == set(world.OBJECTS)
        assert all(row.subject in row.text for row in rows)
        assert not texts & trained
        assert all((concept in text) == (rung != "variant") for text in texts)
        lengths.append(sum(len(text.split()) for text in texts))
    assert lengths.index(max(lengths)) == captions.RUNGS.index("long")


def test_no_prompt_of_a_ladder_is_truncated():
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(bundle.pipeline_folder() / "tokenizer")
    for concept in captions.LADDERS:
        rows = prompt_list(f"mini:{concept}-ladder-long")
        lengths = [len(tokenizer(row.text).input_ids) for row in rows]
        assert 20 < max(lengths) <= tokenizer.model_max_length == 32


def test_a_composition_list_has_the_measured_prompts_that_name_a_background():
    rows = prompt_list("mini:ghosts-composition")
    assert len(rows) == 8 * 32
    assert {row.background for row in rows} == set(world.BACKGROUNDS)
    assert all(row.text.endswith(row.background) and row.subject in row.text for row in rows)
    assert {row.text for row in rows} <= {t for t, _ in captions.list_prompts("ghosts", None)}


@pytest.mark.parametrize("name", ["skulls-ladder-nam", "skulls-composition-train"])
def test_an_unknown_rung_is_refused_with_the_nearest_name(name):
    nearest = {"skulls-ladder-nam": "skulls-ladder-name"}.get(name, "skulls-composition")
    with pytest.raises(UnknownNameError, match=f"Did you mean '{nearest}'"):
        prompt_list(f"mini:{name}")
    with pytest.raises(ConfigError, match="got 65"):
        bundle.prompt_list("skulls-ladder-name", 65)
