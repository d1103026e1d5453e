"""Tokenizers as GGUF has them: the ids that readers of a file compute are those of the tokenizer, or it is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from luthier.core.errors import CorruptError, RecipeError
from luthier.data.tokenizer import Tokenizer as Ours
from luthier.model.gguf.reading_tokens import backend_of
from luthier.model.gguf.splits import APPROXIMATED, CONTRACTED, SPLITS, WHOLE_WORDS
from luthier.model.gguf.vocabulary import PREFIX, PROBES, vocabulary
from luthier.model.load import resolve_source

CORPUS = [*PROBES, *["the harbour master said that the ship would leave at dawn, at dawn or at 12:30"] * 4] * 3
SPACE = "\u2581"


def byte_level(pattern: tuple[str, ...], *, merged_whole: bool = False) -> Ours:
    """A trained byte-level tokenizer that cuts by a pattern."""
    made = Tokenizer(models.BPE(ignore_merges=merged_whole))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(one), "isolated") for one in pattern),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=["<|end|>", "<|start|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return Ours.of(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>"))


def sentencepiece(*, prefix: bool) -> Ours:
    """A tokenizer as Llama 2 (with the space before a text) or Gemma has it, with pieces for all pairs that merge."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyz.,!?'"]
    words = ["th", "he", "the", "an", "in", f"{SPACE}t", f"{SPACE}the", f"{SPACE}a", "er", "ou", "wo", "wor", "or",
             f"{SPACE}w", f"{SPACE}wor", "ld", "is", f"{SPACE}{SPACE}"]  # fmt: skip
    numbered = {piece: number for number, piece in enumerate([*pieces, *letters, *words])}
    pairs = [(words.index(word), word[:cut], word[cut:]) for word in words for cut in range(1, len(word))
             if word[:cut] in numbered and word[cut:] in numbered]  # fmt: skip
    made = Tokenizer(models.BPE(
        numbered, [(left, right) for _, left, right in sorted(pairs)], unk_token="<unk>", byte_fallback=True,
        fuse_unk=True,
    ))  # fmt: skip
    spaced: list[Any] = [normalizers.Replace(" ", SPACE)]
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaced] if prefix else spaced)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Ours.of(PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    ))  # fmt: skip


def with_runs() -> Ours:
    """A tokenizer as Phi 2 has it, with tokens for runs of spaces and tabs."""
    made = byte_level(SPLITS["gpt-2"]).raw.backend_tokenizer
    runs = [*(" " * length for length in range(31, 1, -1)), *("\t" * length for length in range(9, 1, -1))]
    made.add_tokens([AddedToken(run, special=False) for run in runs])
    return Ours.of(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>"))


def stripping() -> Ours:
    """A tokenizer as Phi 3 has it: special tokens swallow the white space behind them."""
    plain = sentencepiece(prefix=False).raw.backend_tokenizer
    plain.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|user|>", "<|end|>", "<|endoftext|>")])
    held = json.loads(plain.to_str())
    for token in held["added_tokens"]:
        token["rstrip"] = token["content"] in ("</s>", "<|user|>", "<|end|>")
    return Ours.of(PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(held)), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    ))  # fmt: skip


def keys_of(tokenizer: Ours) -> dict[str, Any]:
    found = vocabulary(tokenizer, size=tokenizer.vocabulary_size + 3, stop_ids=tokenizer.eos_ids, template="{{ x }}")
    return {key: value.value for key, value in found.keys.items()}


@pytest.mark.parametrize("name", SPLITS)
def test_a_byte_level_tokenizer_comes_back(name: str) -> None:
    """Trained with one of the patterns: the pattern that is found gives its ids, also for texts that were not tried."""
    tokenizer = byte_level(SPLITS[name])
    keys = keys_of(tokenizer)
    read = backend_of(keys)
    for text in (*PROBES, "A NEW text, 99 of 1000; it's (un)seen\n\n\tby <think>all</think> <|end|> of them  "):
        assert read.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)[0].tolist()
    # Rows of the model that no token has are none.
    assert read.get_vocab_size() == tokenizer.vocabulary_size == len(keys[f"{PREFIX}tokens"]) - 3
    types = keys[f"{PREFIX}token_type"]
    assert types[0] == types[1] == 3 and types[tokenizer.vocabulary_size - 1] == 4 and types[-3:] == [5, 5, 5]
    assert keys[f"{PREFIX}eos_token_id"] == 0 and keys["tokenizer.chat_template"] == "{{ x }}"


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe"])
def test_the_own_pattern_comes_first(name: str) -> None:
    """As it stands in the files of these models, where contractions ignore case; and texts that are composed first."""
    (pattern,) = SPLITS[name]
    written = pattern.replace(CONTRACTED, "(?i:'s|'t|'re|'ve|'m|'ll|'d)")
    assert written != pattern
    tokenizer = byte_level((written,))
    tokenizer.raw.backend_tokenizer.normalizer = normalizers.NFC()
    found = vocabulary(tokenizer, size=600, stop_ids={0}, template=None)
    assert found.keys[f"{PREFIX}pre"].value == name and "form NFC" in found.notices[0]


@pytest.mark.parametrize("name", APPROXIMATED)
def test_what_readers_only_approximate_is_told_and_read_as_they_do(name: str) -> None:
    """Breaks when such a tokenizer is refused whole, or the check of an export reads it better than readers do."""
    tokenizer = byte_level(APPROXIMATED[name], merged_whole=name in WHOLE_WORDS)
    found = vocabulary(tokenizer, size=600, stop_ids=(), template=None)
    assert found.keys[f"{PREFIX}pre"].value == name and "combining marks" in found.notices[0]
    read = backend_of({key: value.value for key, value in found.keys.items()})
    for text, alike in (("MixedCase of Éa, über 100", True), ("e\u0301 and", False)):
        assert (read.encode(text).ids == tokenizer.encode(text)[0].tolist()) == alike


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_comes_back(prefix: bool) -> None:
    tokenizer = sentencepiece(prefix=prefix)
    keys = keys_of(tokenizer)
    assert keys[f"{PREFIX}model"] == "llama" and keys[f"{PREFIX}add_space_prefix"] is prefix
    assert keys[f"{PREFIX}add_bos_token"] is True and keys[f"{PREFIX}token_type"][3] == 6
    assert keys[f"{PREFIX}bos_token_id"] == 1 and keys[f"{PREFIX}unknown_token_id"] == 0
    # A score for each token, also for those that fill up: llama.cpp refuses a file with fewer.
    assert len(keys[f"{PREFIX}scores"]) == len(keys[f"{PREFIX}tokens"]) == tokenizer.vocabulary_size + 3
    read = backend_of(keys)
    for text in (*PROBES, "the other world is there,  and the word", "<s>the</s> world<unk>the"):
        assert read.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)[0].tolist()
    assert read.encode("the").ids[0] == 1 and read.get_vocab_size() == tokenizer.vocabulary_size
    assert read.decode(read.encode("the world", add_special_tokens=False).ids) == "the world"


def test_the_seedling_comes_back() -> None:
    """Its own pattern has no name in GGUF; its merges never reach over what the plain one cuts otherwise."""
    tokenizer = Ours.load(resolve_source("seedling"))
    found = vocabulary(tokenizer, size=4096, stop_ids={1}, template=None)
    assert found.keys[f"{PREFIX}pre"].value == "gpt-2" and found.notices == ()


def test_a_pattern_that_no_reader_has_is_refused() -> None:
    """Cut into threes of letters, and merged across words otherwise."""
    with pytest.raises(RecipeError, match="no tokenizer that readers of GGUF have cuts"):
        keys_of(byte_level((r"[\s\S]{7}",)))


def altered(**model: Any) -> Ours:
    tokenizer = sentencepiece(prefix=False)
    held = json.loads(tokenizer.raw.backend_tokenizer.to_str())
    held["model"] |= model
    return Ours.of(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(held)), eos_token="</s>"))


def test_other_tokenizers_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(RecipeError, match="model is WordLevel"):
        keys_of(Ours.of(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<unk>")))
    with pytest.raises(RecipeError, match="marks the middle or the end of words"):
        keys_of(altered(dropout=0.1))
    stripping = sentencepiece(prefix=False)
    stripping.raw.backend_tokenizer.add_special_tokens([AddedToken("<|x|>", rstrip=True, special=True)])
    with pytest.raises(RecipeError, match=r"<\|x\|> swallow the white space"):
        keys_of(stripping)
    with pytest.raises(RecipeError, match="the model 5 rows"):
        vocabulary(sentencepiece(prefix=False), size=5, stop_ids=(), template=None)


def test_the_special_tokens_of_phi_3_come_back() -> None:
    """They swallow the white space behind them, which readers know by the name of the model."""
    tokenizer = stripping()
    found = vocabulary(tokenizer, size=400, stop_ids={2}, template=None)
    assert found.strips and found.notices == ()
    read = backend_of({"general.name": "my Phi-3", **{key: value.value for key, value in found.keys.items()}})
    for text in ("<|user|>\nthe world<|end|>  <|endoftext|> the", "the</s> \n the"):
        assert read.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)[0].tolist()


def test_the_ends_of_turns_have_keys_of_their_own() -> None:
    tokenizer = byte_level(SPLITS["gpt-2"])
    found = vocabulary(tokenizer, size=600, stop_ids=(0, 1), template=None)
    assert [found.keys[f"{PREFIX}{key}_token_id"].value for key in ("eos", "eot")] == [0, 1]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", "bert", "gpt2 or llama"),
        ("pre", "unheard-of", "'unheard-of'"),
        ("tokens", "x", "no list"),
        ("token_type", [1], "1 types for"),
        ("merges", ["a b c"], "one that is no pair"),
    ],
)
def test_keys_that_describe_no_tokenizer(key: str, value: Any, said: str) -> None:
    keys = keys_of(byte_level(SPLITS["gpt-2"])) | {PREFIX + key: value}
    with pytest.raises(CorruptError, match=said):
        backend_of(keys)
    twice = keys_of(byte_level(SPLITS["gpt-2"]))
    twice[f"{PREFIX}tokens"] = ["a"] * len(twice[f"{PREFIX}tokens"])
    with pytest.raises(CorruptError, match="texts twice"):
        backend_of(twice)
