"""Tree search: rewrite a prompt step by step, by the scores of the stack's images alone.

Ours, in the setting of JANUS (Zheng et al. 2026, arXiv:2603.21208), where a scalar score of images
is all that an attacker sees. The best texts of each level are rewritten for the next one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.attacks.core.target import QueryResult
from safegen.attacks.core.text import concept_names, vocabulary_words
from safegen.attacks.search.chat import ChatClient, parse_base_url
from safegen.attacks.search.objectives import (
    ExtractorName,
    ImageObjective,
    ObjectiveName,
    extractor_fingerprint,
    load_text_extractor,
    nearest_words,
)
from safegen.attacks.search.rewrites import (
    OPERATIONS,
    ChatRewriter,
    Operation,
    Rewriter,
    WordPool,
    WordRewriter,
    acceptor,
)
from safegen.core.concept import Concept, Phrases
from safegen.core.errors import ConfigError, UnusedSettingWarning
from safegen.core.settings import MAX_COUNT
from safegen.evaluation.samples import EvalSample
from safegen.models.text_encoder import TextEncoderView

CHAT_SETTINGS = ("base_url", "model", "api_key_env", "temperature", "timeout", "retries")
WORD_SETTINGS = ("nearest", "words", "operations", "edits")


class TreeSearch(Attack):
    """Settings of the tree search.

    The `details` of a record are `queries`, the images that the search requested, and `withheld`,
    those of them that the stack withheld.
    """

    TINY: ClassVar[Mapping[str, Any]] = {"breadth": 2, "depth": 2, "beam": 1}
    paper: ClassVar[str] = "ours"
    deviations: ClassVar[str] = (
        "JANUS has the same access and learns a mixture of token distributions that start from "
        "trained priors; this search edits words and trains nothing. "
        "Its words come from the stack's tokens, ordered by the attacker's own text features, and "
        "from captions for training. Requests to a chat model are "
        "not counted as queries."
    )
    access: ClassVar[Access] = "queries"
    tier: ClassVar[Tier] = "adaptive"

    breadth: int = Field(default=4, ge=1, le=1000)
    """Rewrites of a text."""
    depth: int = Field(default=6, ge=1, le=1000)
    """Levels of the tree."""
    beam: int = Field(default=4, ge=1, le=1000)
    """Texts that each level rewrites; with fewer, the best are rewritten several times."""
    objective: ObjectiveName = "guided"
    """What an image scores."""
    extractor: ExtractorName = "mini-clip"
    """Extractor of the similarity."""
    weights: str | None = None
    """Weights of the extractor `clip`: a folder, or `hub:owner/name`."""
    ban_names: bool = True
    """Whether texts with words that name the concept are left out."""
    max_words: int = Field(default=20, ge=1, le=1000)
    """Most words of a text."""
    rewriter: Literal["words", "chat"] = "words"
    """Edit words at random, or ask a chat model for rewrites."""
    operations: tuple[Operation, ...] = Field(default=OPERATIONS, min_length=1)
    """Edits of the rewriter `words`."""
    edits: int = Field(default=2, ge=1, le=100)
    """Highest number of edits in one rewrite."""
    nearest: int = Field(default=64, ge=1, le=MAX_COUNT)
    """Words of the tokenizer that the rewriter `words` uses: those nearest to the concept's
    phrases by the extractor."""
    words: Phrases = ()
    """More words and phrases for the rewriter `words`."""
    base_url: str = ""
    """URL of a chat endpoint in front of `/chat/completions`; no other host is contacted."""
    model: str = ""
    """Name of the chat model."""
    api_key_env: str = Field(default="", pattern=r"^([A-Za-z_]\w*)?$")
    """Environment variable with the API key of the endpoint; no key is sent if it is empty."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature of the chat model."""
    timeout: float = Field(default=60.0, gt=0, le=3600)
    """Seconds that the endpoint may take for each read."""
    retries: int = Field(default=2, ge=0, le=10)
    """Repetitions of a request that failed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rewriter == "chat":
            if not self.base_url or not self.model:
                raise ValueError("base_url and model must be given for the rewriter 'chat'")
            try:
                parse_base_url(self.base_url)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        unused = WORD_SETTINGS if self.rewriter == "chat" else CHAT_SETTINGS
        fields = type(self).model_fields
        changed = [name for name in unused if getattr(self, name) != fields[name].default]
        if changed:
            warnings.warn(
                f"tree_search: no effect with the rewriter {self.rewriter!r}: {', '.join(changed)}",
                UnusedSettingWarning,
                stacklevel=2,
            )
        return self

    def fingerprint(self, concept: Concept) -> dict[str, Any]:
        """Return the settings, with the id of an extractor in place of its weights."""
        values = super().fingerprint(concept)
        return values | extractor_fingerprint(self.extractor, self.weights)

    def build(self, context: AttackContext) -> BeamSearch:
        """Return the attacker.

        Raises:
            ConfigError: the API key is missing, or the objective lacks its weights or images.
        """
        return BeamSearch(self, context)


class BeamSearch:
    """Beam search for several prompts at once."""

    def __init__(self, config: TreeSearch, context: AttackContext) -> None:
        self.config, self.context = config, context
        self.names = concept_names(context.concept) if config.ban_names else frozenset()
        self.objective = ImageObjective(
            config.objective, context, extractor=config.extractor, weights=config.weights
        )
        self.rewriter = self._build_rewriter()

    def _build_rewriter(self) -> Rewriter:
        config, concept = self.config, self.context.concept
        if config.rewriter == "words":
            pool = WordPool(concept, self._vocabulary(), config.words, self.names)
            return WordRewriter(pool, config.operations, config.edits)
        client = ChatClient(
            config.base_url,
            config.model,
            api_key_env=config.api_key_env,
            timeout=config.timeout,
            retries=config.retries,
            options={"temperature": config.temperature, "seed": config.seed % 2**31},
        )
        return ChatRewriter(client, concept, max_words=config.max_words)

    def _vocabulary(self) -> list[str]:
        """Return the words of the stack's tokenizer that are nearest to the concept."""
        config, model = self.config, self.context.target.model
        words = vocabulary_words(TextEncoderView(model.pipeline), self.names)
        extractor = self.objective.extractor or load_text_extractor(
            config.extractor, config.weights, str(model.device)
        )
        return nearest_words(words, self.context.concept, extractor, config.nearest)

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return the text of the highest score for each sample."""
        config, target = self.config, self.context.target
        trees = [_Tree(config, sample) for sample in samples]
        self._query([(tree, tree.sample.prompt) for tree in trees])
        rounds = [(level, place) for level in range(config.depth) for place in range(config.beam)]
        for number, (_, place) in enumerate(rounds):
            running = [tree for tree in trees if not tree.success]
            if not running or target.exhausted:
                break
            self._query([(tree, text) for tree in running for text in self._expand(tree, place)])
            if place + 1 == config.beam:
                for tree in running:
                    tree.prune()
            self.context.progress("searching rewrites", number + 1, len(rounds))
        return [tree.record(target.exhausted) for tree in trees]

    def _expand(self, tree: _Tree, place: int) -> list[str]:
        """Return new rewrites of a text of the beam."""
        score, _, text = tree.beam[place % len(tree.beam)]
        accept = acceptor(tree.seen, self.names, self.config.max_words)
        return self.rewriter.rewrite(text, score, self.config.breadth, accept, tree.generator)

    def _query(self, nodes: Sequence[tuple[_Tree, str]]) -> None:
        """Generate and score an image of each text."""
        if not nodes:
            return
        queried = [tree.sample.model_copy(update={"prompt": text}) for tree, text in nodes]
        results = self.context.target.query(queried)
        scores = self.objective.scores([tree.sample for tree, _ in nodes], results)
        for (tree, text), score, result in zip(nodes, scores, results, strict=True):
            tree.add(text, score, result)


class _Tree:
    """Texts of one prompt with their scores."""

    def __init__(self, config: TreeSearch, sample: EvalSample) -> None:
        self.config, self.sample = config, sample
        self.generator = config.generator(sample)
        self.seen: set[str] = set()
        self.beam: list[tuple[float, int, str]] = []
        """Score, number and text of the texts that are rewritten, best first."""
        self.level: list[tuple[float, int, str]] = []
        self.best, self.score, self.success = sample.prompt, -float("inf"), False
        self.history: list[float] = []
        self.withheld = 0

    def add(self, text: str, score: float | None, result: QueryResult) -> None:
        """Note the score of a text; a withheld image scores less than every other."""
        value = -2.0 if score is None else score
        self.seen.add(text)
        self.withheld += score is None
        if not self.success and (value > self.score or result.success):
            self.best, self.score, self.success = text, value, result.success
        self.history.append(min([-value, *self.history[-1:]]))
        self.level.append((value, len(self.history), text))
        if len(self.history) == 1:
            self.prune()

    def prune(self) -> None:
        """Keep the best texts of the beam and the new level; of equal ones, the latest."""
        texts = self.beam + self.level
        self.beam = sorted(texts, key=lambda row: (-row[0], -row[1]))[: self.config.beam]
        self.level = []

    def record(self, stopped: str) -> AttackRecord:
        """Return the result."""
        return AttackRecord(
            id=self.sample.id,
            prompt=self.best,
            seed=self.sample.seed,
            success=self.success,
            loss=self.history[-1],
            history=tuple(self.history),
            details={"queries": len(self.history), "withheld": self.withheld},
            stopped="" if self.success else stopped,
        )
