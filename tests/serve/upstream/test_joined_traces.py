"""Joined traces: laws that hold for any two stages."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from safegen.core.generation import GenerationConfig
from safegen.guards.core.result import ACTIONS, GeneratedImage, GuardRecord, GuardTrace
from safegen.serve.gate import check_release
from safegen.serve.messages import GuardInfo, ImageRequest, StackInfo
from safegen.serve.upstream.traces import PASSING_ACTIONS, block_trace, join_image, join_stages

KINDS = st.sampled_from([(True, False), (False, True), (True, True)])
GUARDS = st.lists(KINDS, min_size=1, max_size=4).map(
    lambda kinds: [GuardInfo(f"guard-{k}", *kind) for k, kind in enumerate(kinds)]
)
REQUEST = ImageRequest("1", "a castle", "upstream", (1,), GenerationConfig())
ACTION = st.sampled_from(sorted(ACTIONS))


def make_trace(guards, action, calls=1) -> GuardTrace:
    records = [GuardRecord(g.name, scores={g.name: 0.1}, calls=calls) for g in guards]
    reason = "" if action == "none" else f"{guards[-1].name}: reason" if guards else "fault"
    return GuardTrace(action, reason, tuple(records))


def release(guards, prompt, image):
    checked = GeneratedImage(Image.new("RGB", (8, 8), "white"), image)
    info = StackInfo("upstream", "upstream", "a" * 64, tuple(guards), size=(0, 0))
    return check_release(join_image(guards, prompt, checked), REQUEST, 1, info)


def stages_of(guards):
    return [g for g in guards if g.reads_prompts], [g for g in guards if g.reads_images]


@given(guards=GUARDS, prompt_action=ACTION, image_action=ACTION)
def test_an_image_is_released_if_both_stages_pass(guards, prompt_action, image_action):
    by_prompt, by_image = stages_of(guards)
    prompt = make_trace(by_prompt, prompt_action) if by_prompt else None
    outcome = release(guards, prompt, make_trace(by_image, image_action))
    passes = image_action in PASSING_ACTIONS and (
        prompt is None or prompt_action in PASSING_ACTIONS
    )
    assert (outcome.status == "released") == (passes and bool(by_image or by_prompt))
    assert [record.guard for record in outcome.trace.guards] == [guard.name for guard in guards]


@given(guards=GUARDS, data=st.data())
def test_an_image_is_not_released_if_a_guard_did_not_run(guards, data):
    by_prompt, by_image = stages_of(guards)
    traces = [make_trace(each, "none") for each in (by_prompt, by_image)]
    stage = data.draw(st.sampled_from([k for k, each in enumerate((by_prompt, by_image)) if each]))
    records = list(traces[stage].guards)
    index = data.draw(st.integers(0, len(records) - 1))
    change = data.draw(st.sampled_from(["drop", "no call", "rename", "repeat", "no stage"]))
    if change == "drop":
        del records[index]
    elif change == "no call":
        records[index] = replace(records[index], calls=0)
    elif change == "rename":
        records[index] = replace(records[index], guard="another")
    elif change == "repeat":
        records.insert(index, records[index])
    traces[stage] = GuardTrace("none", "", tuple(records))
    if change == "no stage" and stage == 0:
        traces[0] = None
    elif change == "no stage":
        traces[1] = GuardTrace("none", "")
    assert release(guards, *traces).status == "fault"


@given(guards=GUARDS)
def test_scores_of_both_stages_are_kept(guards):
    by_prompt, by_image = stages_of(guards)
    joined = join_stages(guards, make_trace(by_prompt, "none"), make_trace(by_image, "none"))
    for guard, record in zip(guards, joined.guards, strict=True):
        assert record.scores == {guard.name: 0.1}
        assert record.calls == guard.reads_prompts + guard.reads_images


def test_a_block_of_the_other_server_has_its_stage_and_no_concept_of_ours():
    guards = [GuardInfo("prompt-filter", True, False), GuardInfo("judge-filter", False, True)]
    info = StackInfo("upstream", "upstream", "a" * 64, tuple(guards), size=(0, 0))
    prompt = make_trace(guards[:1], "none")
    for stage in ("input", "output"):
        image = GeneratedImage(None, block_trace(guards, prompt, stage))
        outcome = check_release(image, REQUEST, 1, info, "skulls")
        assert (outcome.status, outcome.stage, outcome.guard) == ("blocked", stage, "upstream")
        assert outcome.categories == ("upstream",)
