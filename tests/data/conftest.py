"""Tiny tokenizers, trained here on a few sentences: byte-level, metaspace in two dialects, and one without marks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from luthier.data.conversation import Conversation, Message, Row
from luthier.data.tokenizer import Tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SENTENCES = [
    "The quick brown fox jumps over the lazy dog. How vexingly quick daft zebras jump!",
    "What is the capital of France? The capital of France is Paris, and it is a large city.",
    "user assistant system model Question Answer Instruction Response [INST] [/INST] <<SYS>>",
    "One two three four five six seven eight nine ten; 1 2 3 4 5 6 7 8 9 0\n\nand so on\n",
]
MARKS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
)  # fmt: skip
MakeTokenizer = Callable[..., Tokenizer]


def build(
    kind: str = "bytes",
    *,
    marks: Sequence[str | AddedToken] = MARKS,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    adds_bos: bool = True,
    template: str | None = None,
    generation_eos: Sequence[int] = (),
) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    backend = _KINDS[kind]()
    named = [token for token in (bos, eos) if token]
    backend.add_special_tokens([*named, *marks])
    if adds_bos and bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    special: dict[str, Any] = {}
    if bos:
        special["bos_token"] = bos
    if eos:
        special["eos_token"] = eos
    raw = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    raw.chat_template = template
    return Tokenizer.of(raw, generation_eos=generation_eos)


def _byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES * 4, trainer)
    return backend


def _with_bytes() -> Backend:
    backend = Backend(models.BPE())
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    vocabulary = {"<unk>": 0, **{token: index + 1 for index, token in enumerate(bytes_)}}
    for sign in ["▁", *map(chr, range(33, 127))]:
        vocabulary.setdefault(sign, len(vocabulary))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("▁", "["), ("i", "n"), ("[", "/"), (":", "▁")]
    for one, two in merges:
        vocabulary.setdefault(one + two, len(vocabulary))
    backend.model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _metaspace() -> Backend:
    backend = _with_bytes()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return backend


def _legacy() -> Backend:
    backend = _with_bytes()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


_KINDS = {"bytes": _byte_level, "metaspace": _metaspace, "legacy": _legacy}
KINDS = tuple(_KINDS)


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """Makes tokenizers; the same arguments give the same object."""
    known: dict[str, Tokenizer] = {}

    def make(kind: str = "bytes", **settings: Any) -> Tokenizer:
        key = repr((kind, sorted(settings.items(), key=lambda item: item[0])))
        if key not in known:
            known[key] = build(kind, **settings)
        return known[key]

    return make


@pytest.fixture(scope="session", params=KINDS)
def any_tokenizer(request: pytest.FixtureRequest, make_tokenizer: MakeTokenizer) -> Tokenizer:
    """Each kind of tokenizer in turn, with all marks and a BOS."""
    return make_tokenizer(request.param)


TalkRow = Callable[..., Row]


@pytest.fixture(scope="session")
def talk() -> TalkRow:
    """A row from (role, content) pairs or messages."""

    def make(*turns: tuple[str, str] | Message, number: int = 0, **settings: Any) -> Row:
        messages = tuple(turn if isinstance(turn, Message) else Message(turn[0], turn[1]) for turn in turns)  # type: ignore[arg-type]
        return Row(number, f"rows.jsonl:{number + 1}:1", Conversation(messages, **settings))

    return make
