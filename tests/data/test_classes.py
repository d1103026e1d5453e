"""Classes: their numbers follow their names and not the order of rows, on disk as in memory, for every model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.data.checks import check_rendered
from luthier.data.conversation import Labelled, Tagged
from luthier.data.prepare import Prepared, Reading, make_renderer, prepare
from luthier.data.rendering.classes import Classes, in_order, ranks
from luthier.data.tokenizer import Tokenizer
from tests.data.kinds import bert, row, t5

ENCODER = Reading(kind="encoder")
PAIRS = [("a film", "good"), ("the end", "bad"), ("so so", "fair"), ("a dog", "good"), ("a cat", "bad")]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def labelled(path: Path, pairs: Sequence[tuple[str, object]]) -> Path:
    return write(path, [{"text": text, "label": label} for text, label in pairs])


def names(made: Prepared) -> list[str]:
    """The class of each training row by name."""
    found = []
    for index in range(len(made.train)):
        labels = made.train[index].labels
        assert labels is not None
        found += [made.classes[label] for label in labels[labels >= 0]]
    return found


def test_names_in_order() -> None:
    assert in_order(["10", "9", "-1"]) == ("-1", "9", "10")
    assert in_order(["10", "9", "x"]) == ("10", "9", "x")
    assert ranks(["10", "9", "-1"]).tolist() == [2, 1, 0]


def test_classes_are_forgotten_with_their_rows_and_given_ones_are_fixed() -> None:
    made = Classes()
    assert [made.id_of(name) for name in ("b", "a", "b")] == [0, 1, 0]
    made.forget_after(1)
    assert made.names == ("b",) and made.id_of("c") == 1
    given = Classes(["b", "a"])
    assert given.id_of("a") == 1
    given.forget_after(0)
    assert given.names == ("b", "a")
    with pytest.raises(DataError, match=r"the class 'aa' is unknown to the model; b, a; did you mean a"):
        given.id_of("aa")
    with pytest.raises(RecipeError, match="'a' is listed twice"):
        Classes(["a", "b", "a"])


def test_numbers_follow_names_whatever_the_order_of_rows(tmp_path: Path) -> None:
    for number, pairs in enumerate((PAIRS, PAIRS[::-1])):
        path = labelled(tmp_path / f"{number}.jsonl", pairs)
        for _ in range(2):  # made, then from the cache
            made = prepare(path, bert(), ENCODER, cache=tmp_path / "cache")
            assert made.classes == ("bad", "fair", "good") and made.store.classes == made.classes
            assert names(made) == [label for _, label in pairs]


def test_whole_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.jsonl", [(f"text {label}", label) for label in (10, 9, 0, 2, 10)])
    made = prepare(path, bert(), ENCODER, cache=tmp_path / "cache")
    assert made.classes == ("0", "2", "9", "10")
    assert names(made) == ["10", "9", "0", "2", "10"]


def test_views_come_back_with_labels_and_types(tmp_path: Path) -> None:
    rows = [{"sentence1": f"text {index}", "sentence2": "b", "label": index % 3} for index in range(200)]
    # The first rows have no types, for they are no pairs.
    first = labelled(tmp_path / "a.jsonl", [(f"alone {index}", index % 2) for index in range(100)])
    made = prepare([first, write(tmp_path / "b.jsonl", rows)], bert(), ENCODER, cache=tmp_path / "cache")
    fresh, _ = make_renderer(bert(), Reading(kind="encoder", classes=made.classes))
    assert len(made.train) == 300
    for index in (0, 99, 100, 299):
        view = made.train[index]
        content = (
            Labelled(f"alone {index}", str(index % 2))
            if index < 100
            else Labelled(f"text {index - 100}", str((index - 100) % 3), "b")
        )
        (wanted,) = fresh.render(row(content))
        assert view.labels is not None and view.types is not None and wanted.labels is not None
        assert view.labels.dtype == np.int32 and view.types.dtype == np.uint8
        assert view.tokens.tolist() == wanted.tokens.tolist() and view.labels.tolist() == wanted.labels.tolist()
        assert view.types.tolist() == ([0] * len(view.tokens) if wanted.types is None else wanted.types.tolist())


def test_rows_without_classes_have_no_more_on_disk(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.jsonl", PAIRS)
    made = prepare(path, bert(), Reading(kind="encoder", wanted=("text",)), cache=tmp_path / "cache")
    assert {file.name for file in made.store.folder.iterdir()} >= {"tokens.npy", "weights.npy"}
    assert not (made.store.folder / "labels.npy").exists() and not (made.store.folder / "types.npy").exists()
    assert (made.classes, made.train[0].labels, made.train[0].types) == ((), None, None)
    assert "classes" not in json.loads((made.store.folder / "store.json").read_text())


def test_tags_of_words(tmp_path: Path) -> None:
    rows = [{"tokens": ["Ada", "sings"], "ner_tags": ["PERSON", "O"]}, {"tokens": ["Oslo"], "ner_tags": ["PLACE"]}]
    made = prepare(write(tmp_path / "a.jsonl", rows), bert(), ENCODER, cache=tmp_path / "cache")
    assert made.classes == ("O", "PERSON", "PLACE") and names(made) == ["PERSON", "O", "PLACE"]


def test_one_class_alone_is_an_error(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.jsonl", [("a", "x"), ("b", "x")])
    with pytest.raises(DataError, match="every training row has the class 'x'; rows of two classes"):
        prepare(path, bert(), ENCODER, cache=tmp_path / "cache")


def test_a_class_that_only_held_out_rows_have_is_an_error(tmp_path: Path) -> None:
    train, held = labelled(tmp_path / "a.jsonl", PAIRS), labelled(tmp_path / "b.jsonl", [("x", "good"), ("y", "odd")])
    with pytest.raises(DataError, match=r"b\.jsonl:2:1: 1 held-out row has a class that no training row has.*'odd'"):
        prepare(train, bert(), ENCODER, evaluation=held, cache=tmp_path / "cache")
    fine = labelled(tmp_path / "c.jsonl", [("x", "good"), ("y", "bad")])
    made = prepare(train, bert(), ENCODER, evaluation=fine, cache=tmp_path / "cache")
    assert (len(made.train), len(made.held_out)) == (5, 2)


TOLD = "stay in training: no other row there has their class"


@pytest.mark.parametrize("reserve", [0.0, 0.3])
def test_a_draw_leaves_every_class_in_training(tmp_path: Path, reserve: float) -> None:
    """Breaks when a class that few rows have ends the run for some seeds, or stays in training without a word."""
    few = [(f"text {index}", "rare" if index in (3, 4) else "good" if index % 2 else "bad") for index in range(12)]
    path = labelled(tmp_path / "a.jsonl", [*few, ("one of its kind", "single")])
    told = 0
    for seed in range(12):
        made = prepare(path, bert(), ENCODER, fraction=0.4, reserve=reserve, seed=seed, cache=tmp_path / "cache")
        assert set(names(made)) == {"bad", "good", "rare", "single"}
        said = [each for each in made.notices if TOLD in each]
        back = int(said[0].partition(" ")[0]) if said else 0
        if reserve == 0:
            assert len(made.held_out) == round(0.4 * 13) - back
        told += len(said)
    assert 2 < told < 12 or reserve


def test_copies_of_a_row_come_back_together(tmp_path: Path) -> None:
    """Breaks when a copy of a row that came back is what the model is judged by."""
    path = labelled(tmp_path / "a.jsonl", [*[("same", "rare")] * 3, *[(f"text {n}", "ab"[n % 2]) for n in range(9)]])
    told = 0
    for seed in range(8):
        made = prepare(path, bert(), ENCODER, fraction=0.4, seed=seed, cache=tmp_path / "cache")
        assert names(made).count("rare") == 3
        told += any(TOLD in each and each.startswith("3 rows") for each in made.notices)
    assert told


def test_the_classes_of_a_trained_model_are_kept(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.jsonl", [("a", "x"), ("b", "x")])
    known = Reading(kind="encoder", classes=("z", "x"))
    made = prepare(path, bert(), known, cache=tmp_path / "cache")
    assert made.classes == ("z", "x") and made.train[0].labels is not None and made.train[0].labels[0] == 1
    other = labelled(tmp_path / "b.jsonl", [("a", "x"), ("b", "y")])
    with pytest.raises(DataError, match=r"b\.jsonl:2:1: the class 'y' is unknown to the model; z, x"):
        prepare(other, bert(), known, cache=tmp_path / "cache")


def test_a_refused_row_brings_no_class(tmp_path: Path) -> None:
    pairs = [("a", "x"), ("\u200b", "odd"), ("b", "y")]
    path = labelled(tmp_path / "a.jsonl", pairs)
    made = prepare(path, bert(), Reading(kind="encoder", on_bad_row="skip"), cache=tmp_path / "cache")
    assert made.classes == ("x", "y") and made.report.rejected == 1
    long = labelled(tmp_path / "b.jsonl", [("a", "x"), ("one " * 40, "odd"), ("b", "y")])
    how = Reading(kind="encoder", max_tokens=16, over_length="drop")
    assert prepare(long, bert(), how, cache=tmp_path / "cache").classes == ("x", "y")


def test_a_causal_decoder_has_the_class_at_the_last_token(any_tokenizer: Tokenizer) -> None:
    made, _ = make_renderer(any_tokenizer, Reading(wanted=("labelled",), max_tokens=24, over_length="truncate"))
    for content in (Labelled("the dog", "x"), Labelled("the dog", "y", "a fox"), Labelled("the dog " * 20, "x", "fox")):
        (view,) = made.render(row(content))
        assert [str(problem) for problem in check_rendered(view, made, row(content))] == []
        assert view.labels is not None and view.types is None and len(view.tokens) <= 24
        assert view.labels.tolist() == [-1] * (len(view.tokens) - 1) + [made.classes.id_of(content.label)]
        assert view.weights.tolist() == [0.0] * (len(view.tokens) - 1) + [1.0]
        assert view.tokens[0] == any_tokenizer.bos_id
    whole = any_tokenizer.raw("the dog\na fox")["input_ids"]
    assert made.render(row(Labelled("the dog", "y", "a fox")))[0].tokens.tolist() == whole
    assert made.counts.truncated == 1


def test_a_causal_decoder_has_a_tag_at_the_last_token_of_its_word(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("bytes")
    made, _ = make_renderer(tokenizer, Reading(wanted=("tagged",)))
    content = Tagged(("vexingly", "quick", "zebras"), ("A", "B", "C"))
    (view,) = made.render(row(content))
    assert [str(problem) for problem in check_rendered(view, made, row(content))] == []
    assert view.tokens.tolist() == tokenizer.raw("vexingly quick zebras")["input_ids"] and view.labels is not None
    places = np.flatnonzero(view.labels >= 0)
    assert view.spans[places, 1].tolist() == [8, 14, 21]
    assert [made.classes.names[label] for label in view.labels[places]] == ["A", "B", "C"]
    cut, _ = make_renderer(tokenizer, Reading(wanted=("tagged",), max_tokens=16, over_length="truncate"))
    long = row(Tagged(("vexingly",) * 9, ("A",) * 9))
    (view,) = cut.render(long)
    assert [str(problem) for problem in check_rendered(view, cut, long)] == []
    # No word stands there by half.
    assert view.labels is not None and view.labels[-1] == 0 and view.spans[-1, 1] % 9 == 8


def test_labelled_rows_stay_texts_for_a_language_model(tmp_path: Path, make_tokenizer: Any) -> None:
    path = labelled(tmp_path / "a.jsonl", PAIRS)
    made = prepare(path, make_tokenizer("bytes"), Reading(), cache=tmp_path / "cache")
    assert made.report.files[0].format == "text" and made.classes == ()


def test_a_run_of_an_encoder_decoder(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.jsonl", PAIRS)
    how = Reading(kind="seq2seq", start_id=0)
    made = prepare(path, t5(), how, fraction=0.2, cache=tmp_path / "cache")
    assert (len(made.train), len(made.held_out), made.classes) == (4, 1, ())
    assert made.report.answers.trained == 5 and made.renderer.stop_ids == {1}
    other = prepare(path, t5(), Reading(kind="seq2seq", start_id=1), fraction=0.2, cache=tmp_path / "cache")
    assert other.store.folder != made.store.folder


def test_an_encoder_splits_one_long_text_by_windows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one two three four " * 30)
    made = prepare(path, bert(), Reading(kind="encoder", max_tokens=16), fraction=0.25, cache=tmp_path / "cache")
    assert len(made.held_out) == 2 and len(made.train) == 7
    assert made.report.answers.trained == 0


def test_rows_that_contradict_each_other_are_noticed(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.jsonl", [*PAIRS, ("a film", "bad"), ("A FILM", "fair"), ("a dog", "good")])
    made = prepare(path, bert(), ENCODER, cache=tmp_path / "cache")
    told = [notice for notice in made.notices if "another class" in notice]
    assert told == [
        f"2 rows say what another one says and have another class (first: {path}:6:1 = {path}:1:1); "
        "no model can learn both"
    ]
    sound = prepare(labelled(tmp_path / "b.jsonl", PAIRS), bert(), ENCODER, cache=tmp_path / "cache")
    assert sound.notices == ()
