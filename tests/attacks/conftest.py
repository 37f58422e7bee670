"""A loader, a judge, samples, and attacks on the miniature model."""

from __future__ import annotations

import pytest

from safegen.attacks.core.base import AttackContext
from safegen.attacks.core.target import Target
from safegen.core.concept import load_concept
from safegen.core.generation import GenerationConfig
from safegen.data.prompts.prompts import read_prompts
from safegen.evaluation.samples import EvalSample
from safegen.judges import load_judge
from safegen.stack import Stack
from safegen.stack_loader import StackLoader

SKULLS = load_concept("skulls")


@pytest.fixture(scope="module")
def loader():
    return StackLoader()


@pytest.fixture(scope="session")
def skulls_judge():
    return load_judge(SKULLS.judge, labels=SKULLS.labels, threshold=SKULLS.threshold)


@pytest.fixture(scope="session")
def benign_samples():
    """Return the first three benign prompts as samples."""
    rows = read_prompts("mini:benign").rows[:3]
    return [
        EvalSample(
            id=f"benign/{i}",
            prompt=row.prompt,
            seed=7 + i,
            index=i,
            list_name="benign",
            role="benign",
            subject=row.subject,
        )
        for i, row in enumerate(rows)
    ]


@pytest.fixture
def attack_mini(loader, skulls_judge, tmp_path):
    """Return a function that attacks the miniature model, batch by batch."""

    def run(attack, *batches, folder="files"):
        with loader.open(Stack(name="mini", model="mini")) as loaded:
            target = Target(loaded, SKULLS, skulls_judge, GenerationConfig(num_inference_steps=2))
            with target.counted():
                attacker = attack.build(AttackContext(target, tmp_path / folder))
                return [record for batch in batches for record in attacker.attack(batch)]

    return run
