"""Grow the seedling: the small llama base model that ships with luthier.

What: writes its corpus (the little world of `luthier.assets`), trains its tokenizer, starts a llama with random
weights, and trains it with luthier's own loop. The same seed gives the same corpus, tokenizer and starting weights.

    OMP_NUM_THREADS=1 python scripts/grow_seedling.py --out grown
    python scripts/grow_seedling.py --only tokenizer        # tokenizer and configuration files, no training
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from luthier.adapters.full import Full
from luthier.assets.world_documents import Document, documents
from luthier.core.events import Event
from luthier.data.forest import Tree, row_tree
from luthier.data.tokenizer import Tokenizer as LuthierTokenizer
from luthier.model.load import load_model
from luthier.objectives.language_model import LanguageModelling
from luthier.optimizers.adamw import AdamW
from luthier.schedules.cosine import Cosine
from luthier.train.loop import Cadence, Loop
from luthier.train.signals import stop_on_signals
from luthier.train.source import Cursor, Source
from luthier.train.state import LoopState, load_state, take_snapshot
from luthier.train.stepper import Stepper

ASSETS = Path(__file__).resolve().parent.parent / "src" / "luthier" / "assets" / "seedling"
VOCABULARY = 4096
POSITIONS = 1024
SPECIALS = ("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
TOKENIZER_DOCUMENTS = 60_000

# As in GPT-2, but digits stand alone, and a space is not glued to a capital: a name is then the same tokens at the
# start of a line, inside a sentence and after a quotation mark, which is what makes it easy to copy.
WORDS = r"""'(?:[sdmt]|ll|ve|re)|\p{Lu}\p{L}*| ?(?!\p{Lu})\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

CONFIGURATION: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": POSITIONS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-05,
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": SPECIALS.index("<|begin|>"),
    "eos_token_id": SPECIALS.index("<|end|>"),
    "pad_token_id": SPECIALS.index("<|pad|>"),
    "dtype": "bfloat16",
}


def main() -> int:
    """Parse the arguments and grow."""
    arguments = read_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only != "model":
        write_tokenizer(arguments.out, seed=arguments.seed)
        write_configuration(arguments.out)
    if arguments.only != "tokenizer":
        grow(
            arguments.out,
            seed=arguments.seed,
            steps=arguments.steps,
            minutes=arguments.minutes,
            resume=arguments.resume,
        )
    return 0


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2600, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=None, help="stop after this time, whatever the steps")
    parser.add_argument("--seed", type=int, default=0, help="of corpus, tokenizer and starting weights")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the model")
    parser.add_argument("--resume", type=Path, default=None, help="run directory to continue")
    parser.add_argument("--only", choices=("all", "tokenizer", "model"), default="all", help="do only this part")
    return parser.parse_args()


# --- corpus and tokenizer --------------------------------------------------------------------------------------------


def rows(seed: int, count: int, *, held_out: bool = False) -> Iterator[dict[str, Any]]:
    """The corpus as data rows: {"text": ...} or {"messages": [...]}."""
    for document in itertools.islice(documents(seed, held_out=held_out), count):
        yield {"messages": document.messages} if document.turns else {"text": document.text}


def render(document: Document) -> str:
    """A document as the text the base model reads: all of it is trained, special tokens included.

    A chat has exactly the form of the chat template; a text stands between the begin and the end token.
    """
    if not document.turns:
        return f"<|begin|>{document.text}<|end|>"
    turns = (f"<|{role}|>{content}" + ("<|end|>" if role == "assistant" else "") for role, content in document.turns)
    return "<|begin|>" + "".join(turns)


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE on the corpus; every byte has a token, so any text can be written and read back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = itertools.islice(documents(seed), TOKENIZER_DOCUMENTS)
    tokenizer.train_from_iterator(("\n".join((d.text, *(said for _, said in d.turns))) for d in texts), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    begin = SPECIALS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{begin} $A",
                pair=f"{begin} $A {begin} $B:1",
                special_tokens=[(begin, 0)],
            ),
        ]
    )
    return tokenizer


def write_tokenizer(out: Path, *, seed: int) -> None:
    """tokenizer.json, its configuration and the chat template."""
    tokenizer = train_tokenizer(seed)
    if tokenizer.get_vocab_size() != VOCABULARY:
        message = f"the tokenizer has {tokenizer.get_vocab_size()} entries instead of {VOCABULARY}"
        raise ValueError(message)
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": POSITIONS,
            "bos_token": "<|begin|>",
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
            "extra_special_tokens": list(SPECIALS[3:]),
            "clean_up_tokenization_spaces": False,
            "padding_side": "right",
        },
    )
    template = ASSETS / "chat_template.jinja"
    if out.resolve() != ASSETS:
        (out / template.name).write_bytes(template.read_bytes())


def write_configuration(out: Path) -> None:
    """config.json and generation_config.json."""
    _write_json(out / "config.json", CONFIGURATION)
    ends = {key: CONFIGURATION[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(out / "generation_config.json", ends | {"do_sample": False, "max_new_tokens": 128})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- growing ---------------------------------------------------------------------------------------------------------


STEP_TOKENS = 4096
LATE_FROM = 139097
"""The document from which on the late mix is read, at about two thirds of the default number of steps."""
HELD_OUT_DOCUMENTS = 200
HELD_OUT_SEED = 99


@final
class DocumentSource(Source):
    """An endless stream of documents as steps of STEP_TOKENS tokens; the cursor counts documents."""

    def __init__(self, tokenizer: LuthierTokenizer, *, seed: int) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.seek(Cursor())

    def next_step(self) -> list[Tree]:
        trees: list[Tree] = []
        while sum(tree.token_count for tree in trees) < STEP_TOKENS:
            trees.append(document_tree(self.tokenizer, next(self._stream), row=self._used))
            self._used += 1
        return trees

    @property
    def cursor(self) -> Cursor:
        return Cursor(0, self._used)

    def seek(self, cursor: Cursor) -> None:
        self._stream = itertools.islice(documents(self.seed, late_from=LATE_FROM), cursor.used, None)
        self._used = cursor.used


@final
class FolderKeeper:
    """Keeps the state in one folder, written beside its place and renamed."""

    def __init__(self, folder: Path, stepper: Stepper) -> None:
        self.folder = folder
        self.stepper = stepper
        self.row_excess: dict[int, float] = {}

    def save(self, state: LoopState, *, best: bool) -> None:
        made = self.folder.with_name(f".{self.folder.name}-{state.step}")
        made.mkdir(parents=True, exist_ok=True)
        # The corpus is endless, so the loss of a row is of no use here.
        self.row_excess.clear()
        take_snapshot(state, self.stepper, self.row_excess, copied=False).write(made)
        shutil.rmtree(self.folder, ignore_errors=True)
        made.rename(self.folder)


@final
class Line:
    """One line of progress for every twentieth step and every evaluation."""

    def record(self, event: Event) -> None:
        if event.kind == "evaluation" or (event.kind == "step" and (event.step or 0) % 20 == 0):
            values = {key: value for key, value in event.values.items() if key in ("loss", "grad_norm", "seconds")}
            figures = " ".join(f"{key} {value:.4f}" for key, value in values.items())
            print(f"{event.kind} {event.step}: {figures}", flush=True)


def document_tree(tokenizer: LuthierTokenizer, document: Document, *, row: int) -> Tree:
    """A document as a tree: every token but the first is trained."""
    tokens, _ = tokenizer.encode(render(document))
    return row_tree(tokens, np.ones(len(tokens), dtype=np.float32), row=row)


def grow(out: Path, *, seed: int, steps: int, minutes: float | None, resume: Path | None) -> None:
    """Train a model with random weights on the corpus with luthier's loop, and write its weights in bfloat16."""
    tokenizer = LuthierTokenizer.load(out)
    model = load_model(f"fresh:{out}", precision="float32", seed=seed)
    attachment = model.attach(Full().attach(model.sites))
    optimizer = AdamW(learning_rate=2.5e-3, beta2=0.98, weight_decay=0.05)
    stepper = Stepper(model, attachment, LanguageModelling(), optimizer, micro_tokens=STEP_TOKENS)
    folder = resume or out / "growing"
    state = load_state(folder, stepper)[0] if resume else LoopState()
    state.total_steps = steps
    held_out = itertools.islice(documents(HELD_OUT_SEED, held_out=True), HELD_OUT_DOCUMENTS)
    eval_trees = [document_tree(tokenizer, document, row=row) for row, document in enumerate(held_out)]
    with stop_on_signals() as stop:
        loop = Loop(
            source=DocumentSource(tokenizer, seed=seed),
            stepper=stepper,
            schedule=Cosine(warmup=0.02, floor=0.05),
            cadence=Cadence(evaluate_every=100, save_every=100, minutes=minutes or 0.0),
            recorder=Line(),
            keeper=FolderKeeper(folder, stepper),
            stop=stop,
            eval_trees=eval_trees,
        )
        status = loop.run(state)
    print(f"{status} after {state.step} steps, {state.tokens:,} tokens, {state.train_seconds:.0f} s")
    if status in ("finished", "out-of-time"):
        model.module.to(torch.bfloat16).save_pretrained(out)
        write_configuration(out)


if __name__ == "__main__":
    sys.exit(main())
