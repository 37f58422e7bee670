"""Cost of Ring-A-Bell: text-encoder passes of ours and of the released search, at equal loss.

    python benchmarks/ring_a_bell.py [--concept skulls] [--prompts 5] [--generations 50]
        [--out docs/results/ring_a_bell_cost.json]

For each benign prompt the released search (`compat`, population 200 as published, fewer
generations) runs to its end. Its result is a text; the loss of that text is its squared distance to
the target, read as the text encoder reads it. Then ours runs, and the passes are counted until its
text has that loss. The second factor asks for more: the loss of the released search's tokens, which
its text does not have. Passes are counted by hooks on the text encoder, in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from common import concept_judge

from safegen.attacks.core.base import AttackContext, AttackRecord
from safegen.attacks.core.target import Target
from safegen.attacks.ring_a_bell import GeneticAttacker, RingABell
from safegen.core.concept import Concept, load_concept
from safegen.core.generation import GenerationConfig
from safegen.data.prompts.prompts import read_prompts
from safegen.evaluation.samples import EvalSample
from safegen.stack import load_stack
from safegen.stack_loader import LoadedStack, StackLoader

COLUMNS = (
    "prompt",
    "released: passes",
    "its tokens' loss",
    "its text's loss",
    "ours: passes to its text's loss",
    "times fewer",
    "ours: passes to its tokens' loss",
    "times fewer (tokens)",
    "ours: passes to the end",
    "loss at the end",
)


def samples(concept: Concept, n: int) -> list[EvalSample]:
    (name,) = concept.lists["benign"]
    return [
        EvalSample(id=f"{name}/{i}", prompt=row.prompt, seed=i, list_name=name, role="benign")
        for i, row in enumerate(read_prompts(name).rows[:n])
    ]


class Counted:
    """One search with the passes after each of its generations."""

    def __init__(
        self, attack: RingABell, loaded: LoadedStack, concept: Concept, sample: EvalSample
    ) -> None:
        self.passes: list[int] = []
        target = Target(loaded, concept, concept_judge(concept), GenerationConfig())
        with tempfile.TemporaryDirectory() as folder, target.counted():
            context = AttackContext(
                target, Path(folder), lambda *_: self.passes.append(target.cost.text_encoder)
            )
            self.attacker: GeneticAttacker = attack.build(context)
            start = target.cost.text_encoder  # the direction, which a concept needs once
            (self.record,) = self.attacker.attack([sample])
        self.passes = [n - start for n in self.passes]

    def passes_to(self, loss: float) -> int | None:
        """Return the passes after which the best candidate has a loss; None if it never has."""
        steps = zip(self.passes, self.record.history, strict=True)
        return next((n for n, best in steps if best <= loss), None)


@torch.no_grad()
def text_loss(attacker: GeneticAttacker, record: AttackRecord, prompt: str) -> float:
    """Return the loss of a text as the encoder reads it."""
    space = attacker.space
    found, wanted = (space.encode(space.tokenize([text])) for text in (record.prompt, prompt))
    goal = wanted + attacker.config.eta * attacker.direction
    return float((found - goal).square().sum())


def row(
    loaded: LoadedStack, concept: Concept, sample: EvalSample, released: RingABell, ours: RingABell
) -> list[Any]:
    old = Counted(released, loaded, concept, sample)
    loss_of_tokens = old.record.loss or 0.0
    loss_of_text = text_loss(old.attacker, old.record, sample.prompt)
    new = Counted(ours, loaded, concept, sample)
    factors = []
    for loss in (loss_of_text, loss_of_tokens):
        n = new.passes_to(loss)
        factors += [n, None if n is None else round(old.passes[-1] / n, 1)]
    return [
        sample.prompt,
        old.passes[-1],
        round(loss_of_tokens),
        round(loss_of_text),
        *factors,
        new.passes[-1],
        round(new.record.loss or 0.0),
    ]


def page(rows: list[list[Any]], args: argparse.Namespace) -> dict[str, Any]:
    factors, tokens = ([r[i] for r in rows] for i in (5, 7))
    median = statistics.median(factor or 0.0 for factor in factors)
    harder = statistics.median(factor or 0.0 for factor in tokens)
    reached = sum(factor is not None for factor in tokens)
    return {
        "title": "Cost of Ring-A-Bell",
        "summary": f"To a text of equal loss, `ring_a_bell` needs {median:.0f} times fewer "
        "text-encoder passes than the released search (median). The loss of the released search's "
        "tokens, which its own text does not have, is reached by ours for "
        f"{reached} of {len(rows)} prompts, with {harder:.1f} times fewer passes (median, 0 for a "
        "prompt where it is not).",
        "model": "the bundled model `mini` (64 x 64 pixels); "
        "**nothing was measured on a full-size model**",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": "CPU, one thread; passes do not depend on it",
        "command": "`python benchmarks/ring_a_bell.py`",
        "n": f"{len(rows)} benign prompts, one search each",
        "tables": [
            {
                "title": "Passes to equal loss",
                "text": "The released search: `compat`, population 200 as published, "
                f"{args.generations} generations instead of 3000. Ours: the default settings. The "
                "loss is the squared distance to the prompt's embedding plus 3 times the concept's "
                "direction. A text's loss is that of the tokens it is read as.",
                "columns": list(COLUMNS),
                "rows": rows,
            }
        ],
        "limits": [
            f"The released search has {args.generations / 30:.0f} % of its published generations; "
            "a longer one ends lower.",
            "The miniature's vocabulary has 827 tokens; CLIP's has 49408, and a smaller part of "
            "its random texts changes when it is read again.",
        ],
    }


def main() -> None:
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--concept", default="skulls")
    ask.add_argument("--prompts", type=int, default=5)
    ask.add_argument("--generations", type=int, default=50)
    ask.add_argument("--out", type=Path, default=Path("docs/results/ring_a_bell_cost.json"))
    args = ask.parse_args()
    torch.set_num_threads(1)
    concept = load_concept(args.concept)
    released = RingABell.preset("paper", generations=args.generations)
    rows = []
    with StackLoader().open(load_stack("mini")) as loaded:
        for sample in samples(concept, args.prompts):
            rows.append(row(loaded, concept, sample, released, RingABell()))
            print(rows[-1], flush=True)
    text = json.dumps(page(rows, args), indent=1, ensure_ascii=False)
    args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
