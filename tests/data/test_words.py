"""Words give the very tokens and spans that the tokenizer gives for the whole text, whatever the text is."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

import luthier.assets
from luthier.core.errors import DataError, MissingError
from luthier.data import words as words_module
from luthier.data.covering import closed
from luthier.data.tokenizer import Tokenizer
from luthier.data.word_patterns import PATTERNS
from luthier.data.words import Words
from luthier.kernels import words as native_module
from luthier.kernels.native_build import COMPILERS

SENTENCES = [
    "The quick brown fox jumps over the lazy dog. It's THE dog's, we'll see; they've 1234 dogs!!\n\n  And so on...\n",
    "def f(x):\n\treturn [x ** 2 for x in range(10)]  # naïve, café, 中文 😀\r\n",
]
MARKS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im")
PLAIN = [chr(code) for code in range(128)]
USUAL = [*"   \n\n\r\t.,'\"!?-_()01239sStTreVElmdDaAbBzZ", "'s", "'LL", "\n\n", "  ", *MARKS]
OTHER = [*"éßÀſİΩ中文½٣ª", "\u00a0", "\u2028", "\u3000", "\u0301", "😀", "\u200b", "\x85"]


def backend(pattern: str = PATTERNS[0], *, built_in: bool = True) -> Backend:
    """A byte-level tokenizer that cuts by a pattern: built into the library, or as a Split of its own."""
    made = Backend(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=built_in)
    split = [] if built_in else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, by_bytes]) if split else by_bytes
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        SENTENCES * 3, trainers.BpeTrainer(vocab_size=500, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    made.add_special_tokens(list(MARKS))
    return made


def seedling() -> Backend:
    return Backend.from_file(str(Path(luthier.assets.__file__).parent / "seedling" / "tokenizer.json"))


BACKENDS = {
    "gpt2": backend,
    **{
        f"split {index}": lambda pattern=pattern: backend(pattern, built_in=False)
        for index, pattern in enumerate(PATTERNS)
    },
    "seedling": seedling,
}


@pytest.fixture(params=["Python", "C++"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to the tokens of words: the twin, and C++ from the first word on."""
    if request.param == "Python":
        monkeypatch.setenv("LUTHIER_KERNELS", "torch")
    elif not any(map(shutil.which, COMPILERS)):
        pytest.skip("there is no compiler")
    monkeypatch.setattr(words_module, "_MUCH", 0)
    return request.param


def demand_way(words: Words, way: str) -> None:
    assert (words._native is not None) == (way == "C++")


def texts(seed: int) -> list[str]:
    draw = random.Random(seed)
    alphabets = (USUAL, PLAIN + USUAL, USUAL * 3 + OTHER, [*OTHER, " ", "a"], SENTENCES)
    return [
        "".join(draw.choices(draw.choice(alphabets), k=draw.choice((0, 1, 2, 5, 20, 100)))) for _ in range(300)
    ]


def demand_same(made, tokenizer: Backend, given: list[str]) -> None:
    assert made is not None
    wanted = tokenizer.encode_batch(given, add_special_tokens=False)
    for text, (ids, spans), whole in zip(given, made, wanted, strict=True):
        assert ids.dtype == spans.dtype == np.int32 and spans.shape == (len(ids), 2)
        assert ids.tolist() == whole.ids, repr(text)
        assert [tuple(span) for span in spans.tolist()] == whole.offsets, repr(text)


@pytest.mark.parametrize("name", BACKENDS)
def test_tokens_and_spans_are_those_of_the_whole_text(name: str, way: str) -> None:
    tokenizer = BACKENDS[name]()
    words = Words.of(tokenizer)
    assert words is not None
    for seed in range(2):
        given = texts(seed)
        # The second time from memory.
        for _ in range(2):
            made = words.encode(given)
            demand_same(made, tokenizer, given)
        closing = words.encode(given, closing=True)
        assert all(
            np.array_equal(spans, closed(raw, text))
            for text, (_, spans), (_, raw) in zip(given, closing, made, strict=True)
        )
    demand_way(words, way)


@pytest.mark.parametrize("name", BACKENDS)
def test_long_texts_are_sliced_without_a_trace(name: str, way: str, monkeypatch) -> None:
    monkeypatch.setattr(words_module, "_SLICE", 40)
    tokenizer = BACKENDS[name]()
    words = Words.of(tokenizer)
    given = ["", *(SENTENCES * 5), "x" * 500, " " * 500, "a b" * 200, "中文 " * 100, "".join(texts(1))]
    demand_same(words.encode(given), tokenizer, given)
    assert len(words_module._slices(given[1])) > 1


@pytest.mark.parametrize("name", BACKENDS)
def test_beginnings_of_a_text_have_the_tokens_they_have_alone(name: str, way: str) -> None:
    """Breaks when a prompt takes over a token of its conversation that it would not have by itself."""
    tokenizer = BACKENDS[name]()
    words = Words.of(tokenizer)
    draw = random.Random(0)
    for text in [*texts(5)[:30], *SENTENCES]:
        stops = [draw.randrange(len(text) + 1) for _ in range(4)]
        given = [text, *(text[:stop] for stop in stops), text[1:], text]
        demand_same(words.encode(given), tokenizer, given)
    shared = [begun.stop for begun in words_module._beginnings(["one two <s>", "one two <", "one", "one two <s>"])]
    assert shared == [0, 7, 0, 7]


def test_what_is_remembered_is_bounded(monkeypatch, way: str) -> None:
    monkeypatch.setattr(words_module, "_MOST_WORDS", 100)
    tokenizer = backend()
    words = Words.of(tokenizer)
    for seed in range(5):
        given = texts(seed)[:40]
        demand_same(words.encode(given), tokenizer, given)
        first, _ = words.sizes
        words.encode(["a few words"])
        assert words.sizes[0] <= max(100, first) and (first <= 100 or words.sizes[0] == 3)
    demand_way(words, way)


def test_forgotten_words_are_learned_again(way: str) -> None:
    tokenizer = backend()
    words = Words.of(tokenizer)
    for _ in range(2):
        demand_same(words.encode(SENTENCES), tokenizer, SENTENCES)
        assert all(words.sizes)
        words.forget()
        assert words.sizes == (0, 0)


def test_more_new_words_than_are_told_at_once(monkeypatch, way: str) -> None:
    monkeypatch.setattr(native_module, "_UNKNOWN", 3)
    tokenizer = backend()
    words = Words.of(tokenizer)
    demand_same(words.encode(texts(1)), tokenizer, texts(1))


def test_it_is_compiled_only_for_much_text(monkeypatch) -> None:
    """Breaks when a few rows wait for a compiler, or many never use it."""
    built: list[str] = []

    def build(pattern: str, controls: object) -> None:
        built.append(pattern)
        raise MissingError("none here")

    asked: list[None] = []
    monkeypatch.setattr(words_module, "is_compiled", lambda: bool(asked.append(None)))
    monkeypatch.setattr(words_module.NativeWords, "build", build)
    monkeypatch.setattr(words_module, "_MUCH", 50)
    words, tokenizer = Words.of(backend()), backend()
    words.encode(["a few words"])
    assert not built
    for _ in range(3):
        demand_same(words.encode(SENTENCES), tokenizer, SENTENCES)
    # And where it cannot be built it is not tried again.
    assert built == ["gpt2"] and len(asked) == 1


def test_ascii_patterns_cut_nothing_out() -> None:
    every = "".join(a + b for a in PLAIN for b in PLAIN)
    for pattern in PATTERNS:
        words = Words(backend(), pattern, ())
        assert "".join(words._cut(every)) == every


def without(**parts: object) -> Backend:
    tokenizer = backend()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_token(text: str = "<odd>", **flags: bool) -> Backend:
    tokenizer = backend()
    tokenizer.add_tokens([AddedToken(text, **flags)])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        without(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        without(pre_tokenizer=pre_tokenizers.Whitespace()),
        without(pre_tokenizer=pre_tokenizers.Metaspace()),
        backend(r"\p{L}+ ?|.", built_in=False),
        without(pre_tokenizer=pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(PATTERNS[1]), "removed"), pre_tokenizers.ByteLevel(False, use_regex=False)])),
        without(pre_tokenizer=pre_tokenizers.Sequence([
            pre_tokenizers.Split(PATTERNS[1], "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])),
        without(normalizer=normalizers.Lowercase()),
        without(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
        without(post_processor=processors.ByteLevel(trim_offsets=True)),
        without(model=models.WordPiece({"a": 0, "[UNK]": 1})),
        without(model=models.BPE({"a": 0}, [], dropout=0.5)),
        without(model=models.BPE({"a": 0}, [], end_of_word_suffix="</w>")),
        without(encode_special_tokens=True),
        with_token(lstrip=True, normalized=False),
        with_token(rstrip=True, normalized=False),
        with_token(single_word=True, normalized=False),
        with_token(normalized=True),
        with_token(text="<end of turn>", normalized=False),
    ],
)  # fmt: skip
def test_whatever_could_differ_has_no_words(tokenizer: Backend) -> None:
    assert Words.of(tokenizer) is None


def test_what_leaves_words_alone_is_taken() -> None:
    composed = without(
        normalizer=normalizers.NFC(),
        post_processor=processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend().token_to_id("<s>"))]),
        ]),
    )  # fmt: skip
    words = Words.of(composed)
    given = ["e\u0301 cafe\u0301 e", *texts(3)]
    demand_same(words.encode(given), composed, given)


def test_a_text_that_its_words_do_not_make_up_goes_to_the_tokenizer(make_tokenizer, monkeypatch) -> None:
    monkeypatch.setenv("LUTHIER_KERNELS", "torch")
    tokenizer: Tokenizer = make_tokenizer("bytes")
    assert tokenizer.words is not None
    wanted = tokenizer.encode("one, two")
    monkeypatch.setattr(tokenizer.words, "_native", None)  # tests before may have had enough text for C++
    monkeypatch.setattr(tokenizer.words, "_may_build", False)
    monkeypatch.setattr(tokenizer.words, "_find", lambda text: text.split())
    assert tokenizer.words.encode(["one, two"]) is None
    ids, spans = tokenizer.encode("one, two")
    assert ids.tolist() == wanted[0].tolist() and spans.tolist() == wanted[1].tolist()


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_many_at_once_are_as_one_by_one(kind: str, make_tokenizer) -> None:
    tokenizer: Tokenizer = make_tokenizer(kind)
    given = ["", "one", "What is the capital?\n", "</s>", "one"]
    for text, (ids, spans) in zip(given, tokenizer.encode_many(given), strict=True):
        alone = tokenizer.encode(text)
        assert ids.tolist() == alone[0].tolist() and spans.tolist() == alone[1].tolist()
    assert tokenizer.encode_many([]) == []


@pytest.mark.parametrize("name", BACKENDS)
def test_the_model_alone_says_of_a_word_what_the_tokenizer_says(name: str) -> None:
    """Breaks when a letter is written otherwise, or a word has to go through what stands before the model."""
    words = Words.of(BACKENDS[name]())
    assert words is not None
    every = [*texts(1), *texts(2), *(one + two for one in PLAIN for two in "a 1'\n.")]
    found = {word for text in every for word in words._cut(text)}
    asked = sorted(word for word in found if word.isascii() and word not in words._specials)
    assert len(asked) > 200
    (alone, own), (whole, edges) = words._asked_alone(asked), words._asked_whole(asked)
    assert np.array_equal(alone, whole) and alone.dtype == whole.dtype and own == edges


@pytest.mark.parametrize("text", ["h\udce9", "\ud800", "😀\udc00"])
def test_half_a_character_is_told(any_tokenizer: Tokenizer, text: str) -> None:
    """Breaks when bytes of a command line that are no UTF-8 end in an error that nobody foresaw."""
    for encode in (any_tokenizer.encode_many, any_tokenizer.encode_closed):
        with pytest.raises(DataError, match=f"at character {len(text)}, which is no character"):
            encode(["fine", text])
