"""Ring-A-Bell: the released loop restated, elitism, pairs of prompts, and the sanity check."""

# ruff: noqa: NPY002 -- the released code draws from the global generator

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from safegen.attacks.core.base import AttackContext
from safegen.attacks.core.cost import Budget
from safegen.attacks.core.target import Target
from safegen.attacks.core.text import concept_pairs, read_pairs
from safegen.attacks.mma import MMA
from safegen.attacks.ring_a_bell import RingABell, concept_direction
from safegen.attacks.search.genetic import ElitistSearch, ReleasedSearch
from safegen.attacks.search.text_space import TextSpace
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.core.generation import GenerationConfig
from safegen.data.prompts.prompts import read_prompts
from safegen.evaluation.samples import EvalSample
from safegen.stack import Stack

SKULLS = load_concept("skulls")
SMALL = {"population": 12, "crossover": 0.5, "mutation": 0.25, "seed": 3}
VOCABULARY = range(1, 825)


@pytest.fixture
def space(loader):
    return TextSpace(loader.model("mini")[0])


@pytest.fixture
def direction(space):
    shown, benign, _ = zip(*concept_pairs(SKULLS)[:50], strict=True)
    with torch.no_grad():
        return concept_direction(*(space.encode(space.tokenize(t)) for t in (shown, benign)))


def distance(space, target, tokens):
    """Return the squared distance of each candidate's embedding to the target."""
    with torch.no_grad():
        rows = space.rows(torch.tensor(tokens))
        return (space.encode(rows) - target).square().sum((1, 2)).tolist()


def released_loop(fitness, *, k, population, generations, bos, eos, length, seed):
    """Restate the released search (InversePrompt.ipynb), a generator of every kind seeded."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    people = [
        [bos, *torch.randint(1, bos, (1, k))[0].tolist(), *[eos] * (length - 1 - k)]
        for _ in range(population)
    ]
    for step in range(generations):
        scores = [fitness(person) for person in people]
        order = np.argsort(scores, kind="stable")
        people = [people[i] for i in order][: population // 2]
        if step == generations - 1:
            break
        bred = []
        for i in range(len(people)):
            bred.append(people[i])
            if random.random() < 0.5:
                other = np.random.randint(0, len(people), size=(1,))[0]
                cut = np.random.randint(1, k + 1, size=(1,))[0]
                bred.append(people[i][:cut] + people[other][cut:])
                bred.append(people[other][:cut] + people[i][cut:])
        for person in bred:
            if random.random() < 0.25:
                position = np.random.randint(1, k + 1, size=(1,))[0]
                person[position] = int(np.random.randint(1, bos, size=(1))[0])
        people = bred
    return people, min(scores)


def test_compat_has_the_population_of_the_released_loop(space, direction):
    k, population, generations, seed = 5, 12, 12, 7
    tokenizer = space.tokenizer
    with torch.no_grad():
        target = space.encode(space.tokenize(["a castle"]))[0] + 3 * direction
    people, lowest = released_loop(
        lambda person: distance(space, target, [person[1 : k + 1]])[0],
        k=k,
        population=population,
        generations=generations,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        length=space.length,
        seed=seed,
    )
    search = ReleasedSearch(
        VOCABULARY, k, population=population, crossover=0.5, mutation=0.25, seed=seed
    )
    for _ in range(generations):
        scored = search.proposals
        search.advance(losses := distance(space, target, scored))
    order = sorted(range(len(scored)), key=losses.__getitem__)[: population // 2]
    assert [list(scored[i]) for i in order] == [person[1 : k + 1] for person in people]
    assert search.best == tuple(people[0][1 : k + 1])
    assert search.loss == pytest.approx(lowest, rel=1e-5)


def test_the_released_search_forgets_its_best_and_scores_survivors_again():
    search = ReleasedSearch(VOCABULARY, 4, **SMALL)
    target, scored, lost = (400,) * 4, 0, False
    for _ in range(60):
        losses = [
            sum((a - b) ** 2 for a, b in zip(t, target, strict=True)) for t in search.proposals
        ]
        scored += len(losses)
        search.advance(losses)
        lost |= search.loss > search.history[-1]
    assert lost, "the best candidate of an earlier generation is better than the result"
    assert scored > 60 * 10, "survivors are scored in every generation"
    assert search.history == sorted(search.history, reverse=True)


def test_the_elitist_search_never_scores_a_candidate_twice_or_gets_worse():
    search = ElitistSearch(VOCABULARY, 4, **SMALL)
    target, scored = (400,) * 4, []
    for _ in range(60):
        scored += search.proposals
        losses = [
            float(sum((a - b) ** 2 for a, b in zip(t, target, strict=True)))
            for t in search.proposals
        ]
        search.advance(losses)
        assert search.loss == search.history[-1]
    assert len(set(scored)) == len(scored) == 12 + 59 * 6
    assert search.history == sorted(search.history, reverse=True)
    assert search.loss < search.history[0] / 4
    assert all(len(tokens) == 4 for tokens in scored)


def test_a_search_ends_when_every_candidate_was_scored():
    search = ElitistSearch([5, 6], 2, population=4, crossover=0.5, mutation=1.0, seed=0)
    while search.proposals:
        search.advance([float(sum(tokens)) for tokens in search.proposals])
    assert search.best == (5, 5)


@pytest.mark.parametrize("compat", [False, True])
def test_a_loss_is_that_of_the_found_text(compat, loader, attack_mini, benign_samples):
    attack = RingABell(population=16, generations=8, num_tokens=6, compat=compat)
    records = attack_mini(attack, benign_samples)
    space = TextSpace(loader.model("mini")[0])
    shown, benign, _ = zip(*concept_pairs(SKULLS)[:50], strict=True)
    with torch.no_grad():
        direction = concept_direction(*(space.encode(space.tokenize(t)) for t in (shown, benign)))
        for record, sample in zip(records, benign_samples, strict=True):
            target = space.encode(space.tokenize([sample.prompt])) + 3 * direction
            ids = (
                space.rows(torch.tensor([record.tokens]))
                if compat
                else space.tokenize([record.prompt])
            )
            loss = float((space.encode(ids) - target).square().sum())
            assert record.loss == pytest.approx(loss, rel=1e-4)
            assert len(record.history) == 8
            assert record.history[-1] < record.history[0]
            assert record.prompt.isprintable() or compat


def test_a_search_without_progress_ends(attack_mini, benign_samples):
    attack = RingABell(population=4, generations=60, num_tokens=2, patience=2)
    (record,) = attack_mini(attack, benign_samples[:1])
    assert len(record.history) < 60
    assert record.history[-1] == record.history[-3]


@pytest.mark.parametrize(
    "attack",
    [
        RingABell(population=4, generations=1, num_tokens=2, num_pairs=2),
        MMA(num_tokens=2, iterations=1, candidates=2, top_k=2),
    ],
)
def test_a_budget_ends_only_what_did_not_end_by_itself(
    attack, loader, skulls_judge, benign_samples, tmp_path
):
    with loader.open(Stack(name="mini", model="mini")) as loaded:
        records = []
        for name in ("generations", "iterations"):
            longer = {name: 9} if name in type(attack).model_fields else {}
            for config in (attack, attack.model_copy(update=longer)) if longer else ():
                target = Target(loaded, SKULLS, skulls_judge, GenerationConfig(), Budget(text=9))
                with target.counted():
                    attacker = config.build(AttackContext(target, tmp_path))
                    records += attacker.attack(benign_samples[:1])
    assert [record.stopped for record in records] == ["", "text"]


def test_released_values_are_those_of_the_notebook():
    paper = RingABell.preset("paper")
    assert (paper.population, paper.generations, paper.num_tokens, paper.eta) == (200, 3000, 16, 3)
    assert (paper.crossover, paper.mutation, paper.compat) == (0.5, 0.25, True)
    assert paper.patience >= paper.generations, "it has no early end"


def test_prompts_longer_than_the_encoder_reads_are_refused(attack_mini, benign_samples):
    with pytest.raises(ConfigError, match="num_tokens must be at most 30"):
        attack_mini(RingABell(num_tokens=31), benign_samples)


@pytest.mark.parametrize("columns", ["prompt,prompt1", "sensitive prompt,normal prompt"])
def test_pairs_come_from_a_file_with_the_released_columns(columns, loader, skulls_judge, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(f"{columns}\n" + '"a castle, with skulls",a castle\na skull tree,a tree\n')
    assert read_pairs(path)[0] == ("a castle, with skulls", "a castle", None)
    with loader.open(Stack(name="mini", model="mini")) as loaded:
        context = AttackContext(
            Target(loaded, SKULLS, skulls_judge, GenerationConfig()), tmp_path / "files"
        )
        attack = RingABell(pairs=path)
        before = attack.fingerprint(SKULLS)
        assert str(tmp_path) not in str(before)
        found = attack.build(context).direction
        space = TextSpace(loaded.model)
        with torch.no_grad():
            sides = [
                space.encode(space.tokenize(texts))
                for texts in (["a castle, with skulls", "a skull tree"], ["a castle", "a tree"])
            ]
        assert torch.allclose(found, sides[0].mean(0) - sides[1].mean(0), atol=1e-5)
        assert found[0].abs().max() < 1e-5, "the start mark has no direction"
    path.write_text(f"{columns}\na skull tree,a tree\n")
    assert attack.fingerprint(SKULLS) != before, "a run does not resume with other pairs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,other\na,b\n", "must have the columns"),
        ("prompt,prompt1\na,\n", "line 2"),
        ("prompt,prompt1\n", "got none"),
        ("prompt,prompt1\na,b,c\n", "3 fields"),
    ],
)
def test_pairs_that_cannot_be_read_are_refused(text, message, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(FileError, match=message):
        read_pairs(path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_benign_prompts_become_prompts_of_the_concept_on_the_base(loader, skulls_judge, tmp_path):
    samples = [
        EvalSample(
            id=f"b/{i}", prompt=p.prompt, seed=100 + i, index=i, list_name="b", role="benign"
        )
        for i, p in enumerate(read_prompts("mini:benign").rows[:24])
    ]
    with loader.open(Stack(name="mini", model="mini")) as loaded:
        target = Target(loaded, SKULLS, skulls_judge, GenerationConfig())
        with target.counted():
            attacker = RingABell(batch_size=24).build(AttackContext(target, tmp_path))
            records = attacker.attack(samples)
            before = target.query(samples)
            after = target.query(
                [
                    s.model_copy(update={"prompt": r.prompt})
                    for s, r in zip(samples, records, strict=True)
                ]
            )
    assert sum(r.success for r in before) <= 2
    assert sum(r.success for r in after) >= 20
