"""Classification: the class of a text, of a pair of texts, or of each word of a text.

Idea: a linear layer over the state of one position (an encoder's first token, a decoder's last, or the first piece of
each word) gives the log-probability of each class. The layer is new, and trained with whatever adapter there is.
Equation: L = -sum_i w_i [(1 - e) log p(c_i | x) + e / C sum_c log p(c | x)] / sum_i w_i, with smoothing e.
Source: Devlin et al., arXiv 1810.04805, section 4.1 (texts) and 5.3 (words); smoothing: arXiv 1512.00567, section 7.
Cost: one forward and backward pass; the head is evaluated on one position a text, or one a word.
Use when: there are texts with one of a few classes each: topics, opinions, intents, names in a sentence.
Not when: the answer is free text (sft, seq2seq), or the classes are many and described in words.
"""

from __future__ import annotations

from typing import Literal, final

import numpy as np
from pydantic import Field

from luthier.core.errors import DataError
from luthier.data.conversation import Meaning
from luthier.data.forest import Forest, Segment, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.model.tasks import Task
from luthier.objectives import Objective


@final
class Classification(Objective):
    """Cross-entropy over classes."""

    level: Literal["text", "word"] = Field("text", description="what has a class: a text (or a pair), or each word")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target that is spread over all classes")

    @property
    def meanings(self) -> tuple[Meaning, ...] | None:
        return ("labelled",) if self.level == "text" else ("tagged",)

    def task(self, classes: tuple[str, ...]) -> Task:
        if len(classes) < 2:
            raise DataError(
                f"the data has {len(classes)} classes",
                allowed="two or more: rows with a text and a label, or words and tags",
                do="look at the columns with: luthier data check",
            )
        return Task("sequence_classes" if self.level == "text" else "token_classes", classes)

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        if view.labels is None or view.trained_count == 0:
            raise DataError(f"row {view.row} has no class", allowed="a label beside the text, or a tag for each word")
        if self.level == "text" and view.trained_count > 1:
            raise DataError(
                f"row {view.row} has {view.trained_count} classes", allowed="one a text", do="set objective.level word"
            )
        segment = Segment(view.tokens, view.weights, labels=np.maximum(view.labels, 0), types=view.types)
        return [Tree((segment,), row=view.row)]

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        if outputs.classes is None:
            raise DataError("the model has no classes", allowed="a model that was loaded for classification")
        smooth = self.label_smoothing
        target = outputs.log_probs if smooth == 0 else (
            (1 - smooth) * outputs.log_probs + smooth * outputs.classes.mean(-1)
        )
        right = (outputs.classes.argmax(-1) == outputs.labels).float() * outputs.weights
        return LossReport(
            -(outputs.weights * target).sum(),
            forest.weight,
            {"accuracy": (float(right.sum()), float(outputs.weights.sum()))},
        )
