"""BLEU: n-grams of an answer that its references have too, by sacrebleu.

Idea: an answer is good when its words, pairs, triples and quadruples of words occur in one of the references, each at
most as often as in the reference that has it most often; answers that are shorter than their nearest reference are
marked down, for short texts are easily precise. Counts are summed over all answers before anything is divided.
Equation: BLEU = 100 exp(min(0, 1 - r/c)) (p_1 p_2 p_3 p_4)^(1/4), with p_n the share of n-grams that are found, c the
length of all answers and r that of the references nearest in length.
Source: Papineni et al., ACL 2002 (aclanthology.org/P02-1040); tokens and smoothing as in sacreBLEU, Post, arXiv
1804.08771.
Cost: no model; about a thousand answers a second on one core.
Use when: answers have a fixed content that several sentences may say, best with several references each, as in E2E NLG.
Not when: many answers are right (open questions), or one number in it decides (exact_match).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import ClassVar, Literal, final

from pydantic import Field

from luthier.core.optional import require
from luthier.metrics import Metric


@final
class Bleu(Metric):
    """Corpus BLEU against all references of each question, from 0 to 100."""

    perfect: ClassVar[float] = 100.0

    lowercase: bool = Field(False, description="whether capitals count as small letters")
    tokenize: Literal["13a", "intl", "char", "none"] = Field("13a", description="what a word is, as sacrebleu names it")

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        most = max(map(len, references))
        # sacrebleu reads one stream for each reference; a question that has fewer of them says None.
        streams = [[known[at] if at < len(known) else None for known in references] for at in range(most)]
        made = _sacrebleu().BLEU(lowercase=self.lowercase, tokenize=self.tokenize)
        return float(made.corpus_score(list(answers), streams).score)

    def require(self) -> None:
        _sacrebleu()


def _sacrebleu() -> ModuleType:
    return require("sacrebleu", extra="metrics", purpose="BLEU")
