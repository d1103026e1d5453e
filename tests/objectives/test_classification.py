"""Classification: cross-entropy over classes, smoothed or not, and how many were right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from luthier.core.errors import DataError
from luthier.data.forest import Forest
from luthier.model.tasks import Task
from luthier.objectives.classification import Classification
from tests import forests, task_models
from tests.task_models import CLASSES, TEXTS


def test_the_loss_is_torchs_cross_entropy_and_accuracy_counts_weights() -> None:
    """Breaks when smoothing is spread over other classes than torch's, or a weight is not in the accuracy."""
    model = task_models.language_model("bert", TEXTS)
    weights = [0.5, 1.0, 2.0, 1.0, 1.5]
    plain = zip(task_models.views_for(Classification()), weights, strict=True)
    views = [replace(view, weights=view.weights * np.float32(weight)) for view, weight in plain]
    for smoothing in (0.0, 0.2):
        method = Classification(label_smoothing=smoothing)
        forest = Forest(tuple(tree for view in views for tree in method.trees(view)))
        outputs = model.token_outputs(forest)
        report = method.loss(outputs, forest)
        logits = []
        for view in views:
            given = torch.from_numpy(view.tokens.astype(np.int64))[None]
            logits.append(model.module(given).logits[0])
        labels = torch.tensor([int(view.labels[0]) for view in views if view.labels is not None])
        each = torch.nn.functional.cross_entropy(
            torch.stack(logits), labels, label_smoothing=smoothing, reduction="none"
        )
        assert report.sum.item() == pytest.approx(float((each * torch.tensor(weights)).sum()), rel=1e-5)
        assert report.weight == pytest.approx(6.0)
        right = (torch.stack(logits).argmax(-1) == labels).float() * torch.tensor(weights)
        assert report.metrics["accuracy"] == pytest.approx((float(right.sum()), 6.0))


def test_what_has_a_class_decides_what_the_model_is_loaded_for() -> None:
    """Breaks when words are classified by the head for texts, or by none."""
    assert Classification().task(CLASSES) == Task("sequence_classes", CLASSES)
    assert Classification(level="word").task(CLASSES) == Task("token_classes", CLASSES)
    assert Classification().meanings == ("labelled",) and Classification(level="word").meanings == ("tagged",)
    with pytest.raises(DataError, match="1 classes"):
        Classification().task(("only",))


def test_rows_without_a_class_or_with_several_are_refused() -> None:
    """Breaks when a tagged row is trained on as a text by its first word."""
    (view, *_) = task_models.views_for(Classification())
    with pytest.raises(DataError, match="row 0 has no class"):
        Classification().trees(forests.view(0, view.tokens))
    labels, weights = np.zeros(len(view.tokens), np.int32), np.zeros(len(view.tokens), np.float32)
    weights[:3] = 1
    tagged = replace(view, labels=labels, weights=weights)
    with pytest.raises(DataError, match="3 classes"):
        Classification().trees(tagged)
