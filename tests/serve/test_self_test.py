"""Self-test at the start: a stack with guards that do not run, or find nothing, is not served."""

from __future__ import annotations

import pytest

from safegen.core.errors import ConfigError
from safegen.judges import Detections
from safegen.serve.config import ServerConfig
from safegen.serve.engine.self_test import check_guards
from safegen.serve.engine.session import open_session
from safegen.serve.messages import GuardInfo, StackInfo
from safegen.serve.server import warn_about_gaps
from tests.serve.conftest import STACK

GUARD = '[[guards]]\nname = "{}"\n{}\n'
JUDGE = 'judge = "mini"\nlabels = ["{}"]'


@pytest.fixture
def check(tmp_path):
    """Return a function that opens a stack with guards, and tests it as at the start."""

    def check(*guards, concept="skulls", change=None):
        stack = tmp_path / "stack.toml"
        stack.write_text('model = "mini"\n' + "".join(GUARD.format(*each) for each in guards))
        config = ServerConfig(
            stacks=(str(stack),), concept=concept, self_test=False, num_inference_steps=6
        )
        with open_session(config, str(stack)) as session:
            if change is not None:
                change(session)
            return check_guards(session, config)

    return check


@pytest.mark.parametrize("concept", ["skulls", None])
def test_guards_that_find_the_concept_pass(check, concept):
    words, judge = 'words = ["skull", "skulls"]', JUDGE.format("skulls")
    assert check(("prompt-filter", words), ("judge-filter", judge), concept=concept) == "skulls"


def test_guards_that_are_tried_on_no_concept_and_images_without_a_guard_are_logged(check, caplog):
    words = ("prompt-filter", 'words = ["dragon"]')
    tested = check(words, concept=None)
    guard = GuardInfo("prompt-filter", reads_prompts=True, reads_images=False)
    warn_about_gaps({"s": StackInfo("s", "mini", "0", guards=(guard,), tested_concept=tested)})
    assert [record.message for record in caplog.records] == [
        "no guard looks at the images of the stack 's'",
        "the guards of the stack 's' were tried on no concept",
    ]
    caplog.clear()
    warn_about_gaps({"safe": STACK})
    assert not caplog.records


def test_a_word_list_without_the_concepts_words_fails(check):
    with pytest.raises(ConfigError, match="prompt-filter must block the phrases of skulls"):
        check(("prompt-filter", 'words = ["dragon"]'))


@pytest.mark.parametrize("concept", ["skulls", "fire"])
def test_a_judge_of_another_concept_fails(check, concept):
    other = {"skulls": "fire", "fire": "skulls"}[concept]
    with pytest.raises(ConfigError, match=f"must cover images of {concept}, and 4 of 4 pass"):
        check(("judge-filter", JUDGE.format(other)), concept=concept)


def test_a_guard_that_steers_too_weakly_fails(check):
    with pytest.raises(ConfigError, match="no image of prompts for skulls may be released"):
        check(("sld", 'preset = "weak"\nconcept = "fire"'))


def test_a_judge_that_cannot_run_fails(check):
    def no_idea(session):
        judge = session.guarded.guards[0].judge
        judge.detect = lambda images: [Detections((), unjudged="no idea") for _ in images]

    with pytest.raises(ConfigError, match="a guard of images must run, got 'judge-filter: unjud"):
        check(("judge-filter", JUDGE.format("skulls")), change=no_idea)
