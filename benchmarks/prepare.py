"""Write what all systems train on: a model with random weights, its tokenizer, one LoRA start and the rows. Offline.

    python benchmarks/prepare.py --home bench-home

- sft/model: a llama of 56.4 million parameters (hidden 512, 8 layers, 8 heads, 4 key-value heads, feed-forward 1408,
  vocabulary 32000, untied head), bfloat16 safetensors, with a byte-level BPE tokenizer trained on the sources of
  Python's own standard library.
- sft/lora.safetensors: the first factor of a rank-16 LoRA at every linear layer (the second one starts at zero).
- sft/rows.jsonl: prompt, completion, their token ids, and how many ids belong to the prompt.

Everything follows from one fixed seed and the standard library of the interpreter that runs this; `sft/digest.txt`
says whether two machines trained on the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 32000
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
MAX_TOKENS = 512
ROWS = 2000
SEED = 0
RANK = 16
SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})
PROMPT_MEDIAN, PROMPT_SIGMA = 80, 0.35
ANSWER_MEDIAN, ANSWER_SIGMA = 55, 0.9
FILES = ("model/config.json", "model/model.safetensors", "model/tokenizer.json", "lora.safetensors", "rows.jsonl")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def prepare(folder: Path) -> str:
    """Write all files into `folder` and return their digest. A complete folder is left alone."""
    mark = folder / "digest.txt"
    if mark.exists():
        return mark.read_text("utf-8").strip()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder / "model")
    model = _model()
    model.save_pretrained(folder / "model")
    save_file(_lora_start(model), folder / "lora.safetensors")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in _rows(tokenizer):
            file.write(json.dumps(row) + "\n")
    digest = _digest(folder)
    mark.write_text(digest + "\n", "utf-8")
    return digest


def _library_texts() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            yield path.read_text("utf-8", "replace")


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_library_texts(), trainer)
    if bpe.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"the standard library gives only {bpe.get_vocab_size()} tokens, {VOCABULARY} are needed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=4096, **SPECIAL)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1408,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(_config()).to(torch.bfloat16)


def linear_sizes() -> tuple[list[tuple[int, int]], tuple[int, int], int, int]:
    """Inputs and outputs of a block's linear layers and of the head, the width of all heads, and the layers."""
    config = _config()
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    blocks = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    blocks += [(hidden, inner), (hidden, inner), (inner, hidden)]
    return blocks, (hidden, config.vocab_size), hidden, config.num_hidden_layers


def _lora_start(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED + 1)
    start = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            bound = 1 / math.sqrt(module.in_features)
            start[name] = torch.empty(RANK, module.in_features).uniform_(-bound, bound, generator=generator)
    return start


def _rows(tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, object]]:
    """Runs of consecutive words from the standard library; lengths of prompts and answers are log-normal."""
    words = [word for text in _library_texts() for word in re.findall(r"[A-Za-z]{1,14}[,.]?", text)]
    draw = random.Random(SEED)
    for _ in range(ROWS):
        prompt = "Question:" + _passage(words, draw, tokenizer, _length(draw, PROMPT_MEDIAN, PROMPT_SIGMA, 192))
        completion = _passage(words, draw, tokenizer, _length(draw, ANSWER_MEDIAN, ANSWER_SIGMA, 300))
        yield row_of(prompt + "\nAnswer:", completion, tokenizer)


def row_of(prompt: str, completion: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """One row. The prompt's ids are a prefix of the whole, and the stop token ends it and is trained."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
    if ids[: len(prompt_ids)] != prompt_ids or not len(prompt_ids) < len(ids) <= MAX_TOKENS:
        raise SystemExit(f"a row of {len(ids)} tokens does not begin with the ids of its prompt, or is too long")
    return {"prompt": prompt, "completion": completion, "input_ids": ids, "prompt_tokens": len(prompt_ids)}


def _length(draw: random.Random, median: int, sigma: float, most: int) -> int:
    return max(4, min(most, round(draw.lognormvariate(math.log(median), sigma))))


def _passage(words: list[str], draw: random.Random, tokenizer: PreTrainedTokenizerFast, tokens: int) -> str:
    """Consecutive words, each after a space, of `tokens` tokens, or one word more."""
    start = draw.randrange(len(words) - tokens)
    chosen = [" " + word for word in words[start : start + tokens]]
    counts = [len(ids) for ids in tokenizer(chosen)["input_ids"]]
    total, taken = 0, 0
    while taken < len(chosen) and total < tokens:
        total += counts[taken]
        taken += 1
    return "".join(chosen[:taken])


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for name in FILES:
        total.update((folder / name).read_bytes())
    return total.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder for all files and environments")
    args = parser.parse_args()
    print(prepare(args.home / "sft"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
