"""Encoder-decoders over a forest: roots through the encoder, their children through the decoder.

Idea: a tree's root is a segment that sees both ways; each child is what the decoder is given, its start token first,
and it predicts its own next tokens. So several answers to one text share the encoder's work. Two flat passes, attention
by segment in both; where the zoo's attention cannot be driven, texts are padded and the encoder still reads each once.
A learned prompt stands before each text, in the encoder; learned keys and values are seen by each answer, in the
decoder. That is how PEFT has them too.
Source: Raffel et al., arXiv 1910.10683, section 2.1 (T5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from luthier.core.errors import DataError, RecipeError
from luthier.data.forest import Forest, Ints, Layout, Span
from luthier.model.attending.attention import ForestPlan, Memory
from luthier.model.attending.relative_bias import by_segment
from luthier.model.editing.edits import LearnedPrompt, LearnedRoot, routed
from luthier.model.routes import Routes
from luthier.model.running.executor import seen_keys_values
from luthier.model.running.outputs import TokenOutputs
from luthier.model.running.scoring import AnyHead, long, outputs_of, score
from luthier.model.zoo import ZooModule

READERS = ("EncDecAttention", "encoder_attn", "crossattention")
"""What the zoo calls the attention of a decoder over an encoder's states."""


@dataclass(frozen=True)
class _Halves:
    """A laid-out forest apart: what the encoder and the decoder are given, end to end, and who reads what.

    `reads[i]` is the encoder's span that the decoder's span i reads; `rows` are the decoder's positions that predict.
    """

    read: Ints
    read_spans: tuple[Span, ...]
    said: Ints
    said_spans: tuple[Span, ...]
    reads: tuple[int, ...]
    rows: Ints

    @classmethod
    def of(cls, layout: Layout) -> _Halves:
        """Raises DataError for a forest that an encoder-decoder cannot read."""
        read: list[Span] = []
        said: list[Span] = []
        reads: list[int] = []
        place: dict[int, int] = {}
        rows = np.full(len(layout.tokens), -1, dtype=np.int32)
        for index, span in enumerate(layout.spans):
            if span.both_ways:
                place[index] = len(read)
                start = read[-1].stop if read else 0
                read.append(Span(start, start + span.length, (), both_ways=True))
                continue
            if len(span.ancestors) != 1:
                raise DataError(
                    f"a segment of an encoder-decoder has {len(span.ancestors)} ancestors",
                    allowed="one, that sees both ways: what the encoder reads",
                )
            start = said[-1].stop if said else 0
            said.append(Span(start, start + span.length, ()))
            reads.append(place[span.ancestors[0]])
            rows[span.start : span.stop] = np.arange(start, start + span.length)
        kept = [layout.tokens[span.start : span.stop] for span in layout.spans if span.both_ways]
        others = [layout.tokens[span.start : span.stop] for span in layout.spans if not span.both_ways]
        if not kept or not others:
            raise DataError(
                f"{len(kept)} texts and {len(others)} answers for an encoder-decoder",
                allowed="some of both",
                do="use objective seq2seq or t_few",
            )
        if (rows[layout.predictors] < 0).any():
            raise DataError(
                "the first token of an answer has weight, but it is what the decoder starts with",
                allowed="weight from its second token on",
            )
        return cls(np.concatenate(kept), tuple(read), np.concatenate(others), tuple(said), tuple(reads),
                   rows[layout.predictors])  # fmt: skip


def run_flat(
    module: ZooModule, forest: Forest, *, head: AnyHead, root: LearnedRoot | None = None
) -> TokenOutputs:
    """Two flat passes, attention by segment."""
    layout = forest.layout
    halves = _Halves.of(layout)
    states, spans = _read(module, halves.read, halves.read_spans, [root] * len(halves.read_spans))
    decoder = module.get_decoder()  # type: ignore[no-untyped-call]
    memory = Memory(tuple(spans[index] for index in halves.reads), _readers(decoder))
    plan = ForestPlan(spans=halves.said_spans, memory=memory, root=seen_keys_values(module, root))
    with by_segment(decoder):
        said = decoder(
            input_ids=long(halves.said, module)[None],
            encoder_hidden_states=states[None],
            attention_mask=_untouched(module),
            encoder_attention_mask=_untouched(module),
            use_cache=False,
            forest_plan=plan,
        ).last_hidden_state[0]
    predicting = said.index_select(0, long(halves.rows, module))
    return outputs_of(layout, score(module, predicting, head, long(layout.labels, module)), module)


def start_of(module: ZooModule) -> int:
    """The token that a decoder's answers start with. Raises RecipeError for a model that does not say it."""
    for said in (module.generation_config, module.config):
        found = getattr(said, "decoder_start_token_id", None)
        if isinstance(found, int):
            return found
    raise RecipeError(
        f"{type(module).__name__} does not say which token its answers start with",
        do="set decoder_start_token_id in config.json",
    )


def read_texts(
    module: ZooModule,
    texts: Sequence[Ints],
    *,
    flat: bool,
    roots: Sequence[LearnedRoot | None],
    routes: Routes | None = None,
) -> tuple[Float[Tensor, "B S d"], Int[Tensor, "B S"]]:
    """The encoder's states of some texts, right-padded, and where there are any: what answers are generated from.

    `roots` has the learned root of each text, `routes` by which adapters they go, end to end or as padded rows.
    """
    stops = np.cumsum([len(text) for text in texts]).tolist()
    spans = tuple(Span(stop - len(text), stop, (), both_ways=True) for text, stop in zip(texts, stops, strict=True))
    tokens = np.concatenate(list(texts))
    with routed(module, routes):
        if not flat:
            ids, mask = _padded(tokens, spans, module)
            return module.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state, mask  # type: ignore[no-untyped-call]
        states, places = _read(module, tokens, spans, roots)
    rows = [states[span.start : span.stop] for span in places]
    ones = [torch.ones(len(row), dtype=torch.int64, device=states.device) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(ones, batch_first=True)


def states_ahead(root: LearnedRoot | None) -> int:
    """How many states the encoder makes of a learned root before those of a text; learned keys are the decoder's."""
    return root.token_count if isinstance(root, LearnedPrompt) else 0


def _read(
    module: ZooModule, read: Ints, spans: Sequence[Span], roots: Sequence[LearnedRoot | None]
) -> tuple[Float[Tensor, "S d"], Sequence[Span]]:
    """The encoder's states of all texts, end to end, and where each lies; a prompt's states belong to its text."""
    encoder = module.get_encoder()  # type: ignore[no-untyped-call]
    tokens = long(read, module)
    given = {"input_ids": tokens[None]}
    if any(states_ahead(root) for root in roots):
        embedded = module.get_input_embeddings()(tokens[None])[0]  # type: ignore[misc]
        parts, behind = [], []
        ahead = 0
        for span, root in zip(spans, roots, strict=True):
            if isinstance(root, LearnedPrompt):
                parts.append(root.embeddings(embedded.dtype))
            parts.append(embedded[span.start : span.stop])
            stop = span.stop + ahead + states_ahead(root)
            behind.append(Span(span.start + ahead, stop, (), both_ways=True))
            ahead += states_ahead(root)
        given, spans = {"inputs_embeds": torch.cat(parts)[None]}, behind
    plan = ForestPlan(spans=spans)
    with by_segment(encoder):
        states = encoder(**given, attention_mask=_untouched(module), forest_plan=plan).last_hidden_state[0]
    return states, spans


def _untouched(module: ZooModule) -> Tensor:
    # A 4-D mask is handed through untouched by every mask function of the zoo: nothing of size T x T is ever built.
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=module.device)


def _readers(decoder: nn.Module) -> frozenset[nn.Module]:
    return frozenset(each for name, each in decoder.named_modules() if name.rpartition(".")[2] in READERS)


def run_padded(module: ZooModule, forest: Forest, *, head: AnyHead) -> TokenOutputs:
    """Each text once through the encoder, each answer a row of the decoder, both right-padded."""
    layout = forest.layout
    halves = _Halves.of(layout)
    texts, text_mask = _padded(halves.read, halves.read_spans, module)
    answers, _ = _padded(halves.said, halves.said_spans, module)
    states = module.get_encoder()(input_ids=texts, attention_mask=text_mask).last_hidden_state  # type: ignore[no-untyped-call]
    reads = long(np.array(halves.reads), module)
    # The right side of an answer is padding that nothing before it sees, so it needs no mask.
    said = module.get_decoder()(  # type: ignore[no-untyped-call]
        input_ids=answers,
        encoder_hidden_states=states.index_select(0, reads),
        encoder_attention_mask=text_mask.index_select(0, reads),
        use_cache=False,
    ).last_hidden_state
    starts = np.array([span.start for span in halves.said_spans])
    index = np.searchsorted(starts, halves.rows, side="right") - 1
    predicting = said[long(index, module), long(halves.rows - starts[index], module)]
    return outputs_of(layout, score(module, predicting, head, long(layout.labels, module)), module)


def _padded(tokens: Ints, spans: Sequence[Span], module: ZooModule) -> tuple[Tensor, Tensor]:
    """Spans as right-padded rows, and where they hold tokens."""
    rows = np.zeros((len(spans), max(span.length for span in spans)), dtype=np.int64)
    mask = np.zeros_like(rows)
    for index, span in enumerate(spans):
        rows[index, : span.length] = tokens[span.start : span.stop]
        mask[index, : span.length] = 1
    return torch.from_numpy(rows).to(module.device), torch.from_numpy(mask).to(module.device)
