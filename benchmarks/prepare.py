"""Write what all systems train on: models with random weights, their tokenizer, LoRA starts and the rows. Offline.

    python benchmarks/prepare.py --home bench-home --models m1,m2

A model of `workloads.py` has a folder of its own, which is written once; m2 takes a gigabyte, m8 sixteen.

- model: its weights, normal with deviation 0.02, bfloat16 safetensors, with a byte-level BPE tokenizer of 32000 ids
  trained on the sources of Python's own standard library. A larger vocabulary has ids that no row uses.
- lora.safetensors: the first factor of a rank-16 LoRA at every linear layer (the second one starts at zero).
- rows.jsonl: prompt and answer as token ids, and how many ids belong to the prompt; lengths are log-normal.
- fixed.jsonl (m2, m8): rows of one length, 512 or 4,096 ids, with a loss on each but the first.

Everything follows from one fixed seed and the standard library of the interpreter that runs this; `digest.txt` says
whether two machines trained on the same bytes.
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
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from workloads import MAX_TOKENS, MODELS, WORKLOADS, Shape

VOCABULARY = 32000
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
ROWS = 2000
FIXED_ROWS = {"m2": 400, "m8": 64}
"""Rows of a fixed length, and for which models."""
SEED = 0
RANK = 16
SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})
PROMPT_MEDIAN, PROMPT_SIGMA = 80, 0.35
ANSWER_MEDIAN, ANSWER_SIGMA = 55, 0.9
FILES = ("model/config.json", "model/model.safetensors", "model/tokenizer.json", "lora.safetensors", "rows.jsonl")
FIXED = "fixed.jsonl"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def prepare(home: Path, name: str) -> str:
    """Write all files of a model into its folder of `home` and return their digest. A complete one is left alone."""
    folder = home / name
    mark = folder / "digest.txt"
    if mark.exists():
        return mark.read_text("utf-8").strip()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder / "model")
    model = _model(MODELS[name])
    model.save_pretrained(folder / "model")
    save_file(_lora_start(model), folder / "lora.safetensors")
    _write(folder / "rows.jsonl", _rows(tokenizer))
    files = FILES
    if name in FIXED_ROWS:
        longest = max(each.longest for each in WORKLOADS.values() if each.model == name)
        _write(folder / FIXED, _fixed_rows(tokenizer, FIXED_ROWS[name], longest))
        files = (*FILES, FIXED)
    digest = _digest(folder, files)
    mark.write_text(digest + "\n", "utf-8")
    return digest


def _write(path: Path, rows: Iterator[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


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


def _config(shape: Shape) -> LlamaConfig | Qwen2Config:
    sizes = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "intermediate_size": shape.inner,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**sizes) if shape.family == "llama" else Qwen2Config(**sizes)


def _model(shape: Shape) -> PreTrainedModel:
    torch.manual_seed(SEED)
    config = _config(shape)
    model = LlamaForCausalLM(config) if shape.family == "llama" else Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        # The zoo starts biases at zero, where one that is forgotten would not be seen in the loss.
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=config.initializer_range, generator=generator)
    return model.to(torch.bfloat16)


def _lora_start(model: PreTrainedModel) -> dict[str, torch.Tensor]:
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


def _fixed_rows(tokenizer: PreTrainedTokenizerFast, rows: int, longest: int) -> Iterator[dict[str, object]]:
    """Rows of exactly so many ids; only the first, which nothing predicts, has no loss."""
    words = [word for text in _library_texts() for word in re.findall(r"[A-Za-z]{1,14}[,.]?", text)]
    draw = random.Random(SEED + 1)
    for _ in range(rows):
        passage = _passage(words, draw, tokenizer, longest)
        yield {"input_ids": tokenizer(passage)["input_ids"][:longest], "prompt_tokens": 1}


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


def _digest(folder: Path, files: Sequence[str]) -> str:
    total = hashlib.sha256()
    for name in files:
        total.update((folder / name).read_bytes())
    return total.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder for all files and environments")
    parser.add_argument("--models", default="m1", help=f"of {', '.join(MODELS)}, with commas between")
    args = parser.parse_args()
    for name in args.models.split(","):
        if name not in MODELS:
            parser.error(f"unknown model {name!r}; there are {', '.join(MODELS)}")
        print(name, prepare(args.home, name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
