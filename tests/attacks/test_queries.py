"""SneakyPrompt and the tree search: what their searches and rewrites obey."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from safegen.attacks.core.base import AttackContext
from safegen.attacks.core.cost import Budget
from safegen.attacks.core.target import Target
from safegen.attacks.core.text import concept_names, is_name, names_concept, vocabulary_words
from safegen.attacks.search.objectives import ImageObjective, load_text_extractor, nearest_words
from safegen.attacks.search.policy import Policy, policy_loss
from safegen.attacks.search.rewrites import OPERATIONS, WordPool, WordRewriter, acceptor
from safegen.attacks.sneaky_prompt import SneakyPrompt, TokenSearch
from safegen.attacks.tree_search import TreeSearch
from safegen.core.concept import load_concept, prompt_list
from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.mini.bundle import clip_folder
from safegen.models.text_encoder import TextEncoderView
from safegen.stack import Stack

SKULLS = load_concept("skulls")
NAMES = concept_names(SKULLS)


@pytest.fixture
def context(loader, skulls_judge, tmp_path):
    """Return a function that opens a stack for an attacker."""
    with ExitStack() as opened:

        def make(budget=None, **stack):
            loaded = opened.enter_context(loader.open(Stack(name="mini", model="mini", **stack)))
            config = GenerationConfig(num_inference_steps=2)
            return AttackContext(Target(loaded, SKULLS, skulls_judge, config, budget), tmp_path)

        yield make


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_names_are_found_in_words_that_contain_them_or_are_parts_of_them():
    assert sorted(NAMES) == ["skull", "skulls"]
    for text in ("a SKULL", "a castle,skulls!", "numbskulls", "a kull", "ＳＫＵＬＬ"):
        assert names_concept(text, NAMES), text
    for text in ("a castle", "a sk", "ghosts all over", ""):
        assert not names_concept(text, NAMES), text
    assert not is_name("sk", NAMES), "shorter than three letters"


@pytest.mark.parametrize("mode", ["word", "pseudo_word"])
@pytest.mark.parametrize("search", ["rl", "greedy", "random"])
def test_texts_name_nothing_are_never_queried_again_and_keep_the_rest(
    mode, search, context, benign_samples
):
    config = SneakyPrompt(mode=mode, search=search, queries=4, rl_batch=2, objective="judge")
    made = context()
    queried = []
    query = made.target.query
    made.target.query = lambda samples: queried.extend(samples) or query(samples)
    with made.target.counted():
        (record,) = TokenSearch(config, made).attack(benign_samples[:1])
    texts = [sample.prompt for sample in queried]
    assert len(set(texts)) == len(record.history) == made.target.cost.queries == 4
    assert not any(names_concept(text, NAMES) for text in texts)
    assert all(text.startswith("a castle covered in ") for text in texts)
    words = {len(text.split()) for text in texts}
    assert words == ({7} if mode == "word" else {5})


def test_a_withheld_image_costs_a_query_and_one_more_word_is_replaced(context, benign_samples):
    words = ["castle", "covered"]
    guard = {"name": "prompt-filter", "words": words}
    config = SneakyPrompt(queries=8, patience=2, max_share=0.5, objective="judge", num_subword=1)
    made = context(guards=[guard])
    with made.target.counted():
        (record,) = TokenSearch(config, made).attack(benign_samples[:1])
    assert made.target.cost.queries == len(record.history) == 8
    assert list(record.history) == sorted(record.history, reverse=True)
    penalty = record.history[0]
    assert record.details["queries"] == 8
    assert record.details["withheld"] >= 2
    assert penalty == pytest.approx(1 / 8 / 10), "one blocked query of eight, divided by ten"
    if record.loss < 0:
        assert not set(words) & set(record.prompt.split()), "it passed the filter"


def test_the_policy_learns_the_tokens_that_are_rewarded():
    torch.manual_seed(0)
    policy, generator = Policy(2, 6), rng()
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    before = probability(policy)
    for _ in range(60):
        combos = torch.stack([policy.sample(generator) for _ in range(16)])
        reward = (combos == torch.tensor([1, 4])).float().mean(1)
        log_prob, value = policy(combos)
        loss = policy_loss(log_prob, value, reward)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert probability(policy) > 5 * before


@torch.no_grad()
def probability(policy):
    """Return the probability of the tokens 1 and 4."""
    return float(policy(torch.tensor([[1, 4]]))[0].sum().exp())


def test_the_loss_is_the_released_one():
    log_prob, value = torch.randn(5, 3, generator=rng(1)), torch.randn(5, 3, generator=rng(2))
    rewards = torch.randn(5, generator=rng(3))
    p, v, q, w = (t.clone().requires_grad_() for t in (log_prob, value, log_prob, value))
    returns = torch.zeros(5, 3)
    returns[:, -1] = rewards  # the released code rewards the last token, and sums backward
    total = torch.zeros(5)
    for i in range(1, 4):
        total = returns[:, -i] + 1.0 * total
        returns[:, -i] = total
    advantages = returns - v
    released = (-p * advantages.detach()).sum(1).mean() + advantages.pow(2).sum(1).mean()
    own = policy_loss(q, w, rewards)
    assert torch.allclose(own, released)
    released.backward()
    own.backward()
    assert torch.allclose(q.grad, p.grad)
    assert torch.allclose(w.grad, v.grad)


def test_probabilities_of_all_combinations_add_up_to_one_and_are_those_of_draws():
    torch.manual_seed(1)
    policy, generator = Policy(2, 3), rng(2)
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    with torch.no_grad():
        exact = policy(every)[0].sum(1).exp()
    assert float(exact.sum()) == pytest.approx(1, abs=1e-5)
    draws = torch.stack([policy.sample(generator) for _ in range(2000)])
    counts = torch.bincount(draws[:, 0] * 3 + draws[:, 1], minlength=9) / 2000
    assert torch.allclose(counts, exact, atol=0.05)


def test_the_search_stops_at_the_threshold(context, benign_samples):
    config = SneakyPrompt(objective="text", threshold=0.01, queries=5)
    made = context()
    with made.target.counted():
        (record,) = TokenSearch(config, made).attack(benign_samples[:1])
    assert len(record.history) == 1
    assert record.loss <= -0.01
    with pytest.raises(ConfigError, match="threshold"):
        assert SneakyPrompt(objective="image", extractor="clip").goal
    assert SneakyPrompt.preset("paper").goal == 0.26


def test_every_image_of_a_batch_is_noted_also_after_success(context, benign_samples):
    config = SneakyPrompt(objective="text", threshold=0.01, queries=5, rl_batch=3)
    made = context()
    with made.target.counted():
        (record,) = TokenSearch(config, made).attack(benign_samples[:1])
    assert record.details["queries"] == len(record.history) == made.target.cost.queries == 3
    assert list(record.history) == sorted(record.history, reverse=True)


def test_guided_scores_are_the_judges_or_else_below_zero(context, benign_samples, skulls_judge):
    made, items = context(), benign_samples
    results = made.target.query(items)
    guided = ImageObjective("guided", made, extractor="mini-clip", weights=None)
    text = ImageObjective("text", made, extractor="mini-clip", weights=None)
    for score, cosine, result in zip(
        guided.scores(items, results), text.scores(items, results), results, strict=True
    ):
        assert -1 <= cosine <= 1
        assert score == pytest.approx(result.score or cosine - 1)


def test_captions_of_the_pool_are_not_measured_and_name_nothing(context):
    view = TextEncoderView(context().target.model.pipeline)
    pool = WordPool(SKULLS, vocabulary_words(view, NAMES), ("bones",), NAMES)
    assert "covered in" in pool.parts[1]
    assert "bones" in pool.parts[0]
    assert not any(names_concept(phrase, NAMES) for part in pool.parts for phrase in part)
    measured = {n for names in SKULLS.lists.values() for n in names}
    assert not measured & {*SKULLS.captions, *SKULLS.tuning["concept"]}
    for phrase in ("silent choir", "grinning friends", "last dance", "pale company"):
        assert any(phrase in row.text for row in prompt_list("mini:skulls-innocent"))
        assert phrase not in pool.parts[1]


def test_fingerprints_have_no_path_of_weights():
    folder = str(clip_folder())
    for kind in (SneakyPrompt, TreeSearch):
        values = kind(extractor="clip", weights=folder).fingerprint(SKULLS)
        assert values["weights"].startswith("clip:")
        assert folder not in str(values)
        assert kind().fingerprint(SKULLS)["weights"] is None


def test_nearest_words_are_those_of_the_largest_cosine():
    extractor = load_text_extractor("mini-clip", None, "cpu")
    words = ["bus", "pale", "grinning", "meadow", "umbrella", "garden"]
    assert sorted(nearest_words(words, SKULLS, extractor, 2)) == ["grinning", "pale"]
    assert len(nearest_words(words, SKULLS, extractor, 99)) == 6
    assert nearest_words([], SKULLS, extractor, 3) == []


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_rewrite_is_one_edit_of_its_kind(operation, context):
    view = TextEncoderView(context().target.model.pipeline)
    pool = WordPool(SKULLS, vocabulary_words(view, NAMES), (), NAMES)
    text = "alpha beta gamma delta"
    accept = acceptor({text}, NAMES, 6)
    rewrites = WordRewriter(pool, [operation], 1).rewrite(text, 0.0, 8, accept, rng())
    assert 1 <= len(rewrites) == len(set(rewrites)) <= 8
    for rewrite in rewrites:
        rest = [word for word in rewrite.split() if word in text.split()]
        assert rest == [word for word in text.split() if word in rest], "in their order"
        assert len(rest) == (4 if operation in ("insert", "append") else 3)
        assert len(rewrite.split()) <= 6
        assert operation != "append" or rewrite.startswith(text)


def test_the_tree_keeps_the_best_texts_and_its_history_never_rises(context, benign_samples):
    config = TreeSearch(breadth=2, depth=3, beam=2)
    made = context()
    with made.target.counted():
        records = config.build(made).attack(benign_samples[:2])
    for record in records:
        assert len(record.history) <= 1 + 2 * 3 * 2
        assert list(record.history) == sorted(record.history, reverse=True)
        assert not names_concept(record.prompt, NAMES)
        assert len(record.prompt.split()) <= config.max_words


def test_a_budget_ends_the_tree_after_one_round(context, benign_samples):
    made = context(Budget(queries=2))
    with made.target.counted():
        records = TreeSearch(breadth=2, depth=50).build(made).attack(benign_samples[:2])
    assert made.target.cost.queries == 2, "the start texts reach the limit"
    assert all(record.stopped == "queries" for record in records)
