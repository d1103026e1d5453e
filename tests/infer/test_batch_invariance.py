"""Batch invariance: what a request says, to the last bit of its log-probabilities, is the same in any company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from luthier.adapters import Adapter
from luthier.adapters.bottleneck import Bottleneck
from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.adapters.trainable_tokens import TrainableTokens
from luthier.core import catalog
from luthier.infer.continuation import Continuation
from luthier.infer.drafts import Drafter
from luthier.infer.engine import Engine
from luthier.infer.reader import ALONE, PagedReader, Reading
from luthier.infer.request import News, Request
from luthier.infer.sampler import Chooser, choose, log_probs_of
from luthier.infer.scheduler import PIECE, Part, Room, Scheduler
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import PolicySampling, Sampling
from luthier.recipes.opening.pooled import pool_of
from luthier.recipes.opening.quantized import quantize
from tests import forests, longrope, task_models
from tests.forests import ARCHITECTURES
from tests.infer.test_adapter_pool import METHODS, saved
from tests.task_models import ANSWERS

RNG = np.random.default_rng(5)
LENGTHS = (1, 2, 20, 40, PIECE, PIECE + 1, 190)
TRUNK = forests.tokens(RNG, 190)
"""Prompts begin alike, so that some find pages of others."""
PROMPTS = [np.concatenate([TRUNK[: count // 2], forests.tokens(RNG, count - count // 2)]) for count in LENGTHS]
PROMPTS += [np.concatenate([TRUNK[: PIECE + 5], forests.tokens(RNG, 20)]) for _ in range(2)]
COMPANY = [forests.tokens(RNG, int(count)) for count in RNG.integers(1, 60, 33)] + [TRUNK[:150], PROMPTS[2]]
WIDE = Room(tokens=16 * 2000)
TIGHT = Room(tokens=16 * 14, pass_tokens=64)
"""So little that texts are put back while they speak, and read what they have said once more."""

Told = list[list[tuple[int, float, tuple[tuple[int, float], ...]]]]


def asked(place: int, *, adapter: str = "", said: int = 12) -> Request:
    """A request whose text is to be the same in any company; all of them draw, save one."""
    sampling = Sampling(max_new_tokens=said, temperature=0.0 if place == 3 else 1.3, seed=place, likeliest=2)
    return Request(prompt=PROMPTS[place], sampling=sampling, adapter=adapter, batch_invariant=True)


def others(adapters: Sequence[str] = ("",)) -> list[Request]:
    """Company: of all lengths, under all of these adapters; some are told of many tokens, some at their temperature."""
    made = []
    for place, prompt in enumerate(COMPANY):
        told_at = PolicySampling if place % 5 == 0 else Sampling
        sampling = told_at(max_new_tokens=3 + place % 9, temperature=0.7, seed=place, likeliest=place % 21)
        made.append(Request(prompt=prompt, sampling=sampling, adapter=adapters[place % len(adapters)]))
    return made


def told(engine: Engine, requests: Sequence[Request], company: Sequence[Request] = (), *, ahead: int = 0) -> Told:
    """What the choices of these requests are told, bit for bit; company comes `ahead`, and then one each step."""
    left = list(company)
    for _ in range(min(ahead, len(left))):
        engine.add(left.pop())
    numbers = [engine.add(request) for request in requests]
    news: list[News] = []
    while engine.busy:
        news += engine.step()
        if left:
            engine.add(left.pop())
    found: dict[tuple[int, int], list[tuple[int, float, tuple[tuple[int, float], ...]]]] = {}
    for each in news:
        assert each.failure is None, each.failure
        found.setdefault((each.request, each.choice), []).extend(
            (said.token, said.log_prob, said.likeliest) for said in each.said
        )
    return [found[number, choice] for number, request in zip(numbers, requests, strict=True)
            for choice in range(request.choices)]  # fmt: skip


def check(model: LanguageModel, requests: Sequence[Request], *, room: Room = WIDE, longest: int = 200) -> None:
    """Each of them alone, all of them together, and all of them among others say the very same."""
    alone = [text for request in requests for text in told(Engine(model, room=WIDE), [request])]
    assert told(Engine(model, room=room), requests) == alone
    company = [each for each in others() if len(each.prompt) < longest]
    engine = Engine(model, room=room)
    assert told(engine, requests, company, ahead=25) == alone
    # Once more, when there are pages to be found, and company comes later.
    assert told(engine, requests, company) == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_text_is_the_same_alone_and_among_others(architecture: str, dtype: torch.dtype) -> None:
    """Breaks when a piece of a prompt, or a token, is computed in a pass whose number of rows others decide."""
    model = forests.language_model(architecture, dtype=dtype)
    check(model, [asked(place, said=6) for place in range(len(PROMPTS))])


def test_without_it_company_does_turn_texts() -> None:
    """Breaks when the tests here would pass whatever the reader does: products of few rows and of many differ."""
    model = forests.language_model("llama", dtype=torch.bfloat16)
    plain = [replace(asked(place), batch_invariant=False) for place in range(len(PROMPTS))]
    alone = [text for request in plain for text in told(Engine(model, room=WIDE), [request])]
    assert told(Engine(model, room=WIDE), plain, others(), ahead=30) != alone


@pytest.mark.parametrize("method", [name for name in catalog.names("quantizers") if name != "none"])
def test_it_holds_for_packed_weights(method: str) -> None:
    """Breaks when products with packed weights depend on the number of rows."""
    model = forests.language_model("llama", dtype=torch.bfloat16)
    quantize(model, catalog.load("quantizers", method)(), head=True)
    check(model, [asked(place, said=6) for place in (1, 3, 5, 7, 8)])


@pytest.mark.parametrize("named", [True, False])
def test_it_holds_for_a_whole_pass_of_one_adapter_over_packed_weights(tmp_path: Path, named: bool) -> None:
    """Breaks when terms of as many rows as a pass has are the library's products."""
    lora, dtype = LoRA(rank=4), torch.bfloat16
    model = forests.language_model("llama", dtype=dtype)
    quantize(model, catalog.load("quantizers", "nf4")(), head=False)
    pool = None
    if named:
        pool = pool_of(model, {"lora": saved(tmp_path / "lora", lora, dtype=dtype)}, most=4)
    else:
        forests.shake(model.attach(lora.attach(model.sites)).named_parameters().values(), std=0.3)
        assert model.keeps_rows_apart(None) == (model.executor.backend.few > 0)
    requests = [asked(place % 3, adapter="lora" if named else "") for place in range(36)]
    alone = [text for request in requests[:3] for text in told(Engine(model, room=WIDE, pool=pool), [request])]
    assert told(Engine(model, room=WIDE, pool=pool), requests) == alone * 12


@pytest.mark.parametrize("adapter", [LoRA(rank=4), Bottleneck(size=4), PrefixTuning(prefix_tokens=3)], ids=str)
def test_it_holds_for_what_is_switched_on(adapter: Adapter) -> None:
    """Breaks when edits that torch computes, whose sums depend on the rows, go side by side."""
    model = forests.language_model("llama", dtype=torch.bfloat16)
    forests.shake(model.attach(adapter.attach(model.sites)).named_parameters().values())
    check(model, [asked(place, said=6) for place in (1, 3, 5, 7, 8)])


@pytest.mark.parametrize("adapter", [None, LoRA(rank=4), Bottleneck(size=4)], ids=str)
def test_it_holds_for_drafts(adapter: Adapter | None) -> None:
    """Breaks when tokens that are looked at beside a draft are others than those that are said one by one."""
    model = forests.language_model("llama", dtype=torch.bfloat16)
    if adapter is not None:
        forests.shake(model.attach(adapter.attach(model.sites)).named_parameters().values())
    plain = [replace(asked(place, said=60), prompt=np.tile(PROMPTS[place][:5], 9)) for place in (1, 2, 3, 4, 5, 6, 7)]
    alone = [told(Engine(model, room=WIDE), [request])[0] for request in plain]
    engine = Engine(model, room=WIDE)
    company = [replace(each, drafts=8) for each in others()]
    assert told(engine, [replace(each, drafts=20) for each in plain], company, ahead=12) == alone
    assert (engine.counts.agreed > 0) == model.keeps_rows_apart(None)
    # As many as there may be, when nobody else is there.
    for request, text in zip(plain, alone, strict=True):
        assert told(Engine(model, room=WIDE), [replace(request, drafts=20)]) == [text]


def test_it_holds_in_a_room_in_which_texts_are_put_back() -> None:
    """Breaks when what was said is read again in one piece, or a page of it is found by its name."""
    model = forests.language_model("qwen2", dtype=torch.bfloat16)
    requests = [replace(asked(place, said=60), drafts=4) for place in (0, 1, 2)]
    requests += [replace(asked(3, said=60), prompt=np.tile(PROMPTS[place][:5], 4), drafts=4) for place in (2, 3)]
    alone = [text for request in requests for text in told(Engine(model, room=WIDE), [request])]
    # Those that came before stay, and the last ones give way.
    company = [replace(each, sampling=replace(each.sampling, max_new_tokens=50)) for each in others()[:12]]
    engine = Engine(model, room=TIGHT)
    assert told(engine, requests, company, ahead=9) == alone
    read = engine.counts.read
    once = sum(len(each.prompt) + each.sampling.max_new_tokens - 1 for each in (*requests, *company))
    assert read > once + 100, "nothing was put back"


def test_choices_and_prompt_log_probs_are_the_same_too() -> None:
    """Breaks when a twin, or what is told of a prompt, depends on company."""
    model = forests.language_model("llama", dtype=torch.bfloat16)
    check(model, [replace(asked(place), choices=3) for place in (2, 4, 6)])
    request = replace(asked(6), sampling=replace(asked(6).sampling, prompt_log_probs=True))

    def of_prompt(company: Sequence[Request]) -> list[float]:
        engine = Engine(model, room=WIDE)
        for each in company:
            engine.add(each)
        number = engine.add(request)
        while engine.busy:
            for news in engine.step():
                if news.request == number and news.prompt is not None:
                    return [said.log_prob for said in news.prompt]
        raise AssertionError("nothing was told")

    assert of_prompt(()) == of_prompt(others()[:20])


def test_a_choice_that_comes_later_is_read_as_the_first_one_was() -> None:
    """Breaks when a twin for which there is no row reads less of the prompt than the one that tells of it."""
    model = forests.language_model("llama")
    own = replace(asked(6), choices=3, sampling=replace(asked(6).sampling, prompt_log_probs=True))
    alone = told(Engine(model, room=WIDE), [own])
    assert told(Engine(model, room=replace(WIDE, rows=4)), [own], others()[:8], ahead=8) == alone


def test_adapters_that_rows_do_not_name_are_not_counted() -> None:
    """Breaks when an adapter that computes for others alone sends the one that is on through the library."""
    model = forests.language_model("llama")
    for name in ("on", "other"):
        attached = model.attach(LoRA(rank=4).attach(model.sites), name=name, named_only=name == "other")
        forests.shake(attached.named_parameters().values())
    assert model.keeps_rows_apart(None) == (model.executor.backend.few > 0)
    reader = Engine(model)._gate.reader()
    with torch.no_grad():
        assert isinstance(reader, PagedReader) and reader._thin(3) is not None
    check(model, [asked(place, said=6) for place in (1, 3, 5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_holds_for_adapters_of_all_kinds_in_one_batch(tmp_path: Path, dtype: torch.dtype) -> None:
    """Breaks when the adapters of others, or a whole pass of one adapter, change how a row is computed."""
    files = {
        name: saved(tmp_path / name, adapter, seed=len(name), dtype=dtype) for name, adapter in METHODS.items()
    }

    @cache
    def model() -> LanguageModel:
        return forests.language_model("llama", dtype=dtype)

    def engine() -> Engine:
        return Engine(model(), room=WIDE, pool=pool)

    pool = pool_of(model(), files, most=64)
    names = ["", *files]
    requests = [asked(place, adapter=names[(place + shift) % len(names)]) for shift in (0, 3) for place in (1, 3, 5, 8)]
    alone = [told(engine(), [request])[0] for request in requests]
    assert told(engine(), requests, others(names), ahead=30) == alone
    # So many rows of one adapter that they fill a pass.
    many = [asked(place % 3, adapter="lora") for place in range(36)]
    assert told(engine(), many) == [text for request in many[:3] for text in told(engine(), [request])] * 12


@pytest.mark.parametrize("kind", ["t5", "mamba"])
def test_it_holds_for_models_with_a_cache_of_their_own(kind: str) -> None:
    """Breaks when such a text is padded to the length of others, or computed beside them."""
    model = (
        LanguageModel(forests.mamba(), source="tiny/mamba", digest="m") if kind == "mamba"
        else task_models.language_model(kind, ANSWERS)
    )  # fmt: skip
    check(model, [asked(place) for place in (1, 2, 3)], room=Room(tokens=1, rows=16), longest=60)


def test_tokens_go_side_by_side_where_a_row_is_the_same_in_any_company() -> None:
    """Breaks when each invariant text costs a pass of its own, or edits that torch computes go side by side."""
    model = forests.language_model("llama", dtype=torch.bfloat16)

    def passes(model: LanguageModel) -> list[int]:
        engine, rows = Engine(model, room=WIDE), []
        for request in [asked(2)] * 5 + others()[:3]:
            engine.add(request)
        engine.step()
        assert isinstance(engine._reader, PagedReader)
        passed = engine._reader._pass

        def counted(parts: list[Part]) -> Reading:
            rows.append(len(parts))
            return passed(parts)

        engine._reader._pass = counted  # type: ignore[method-assign]
        engine.step()
        return rows

    fast = model.executor.backend.few > 0
    assert passes(model) == ([8] if fast else [1, 1, 3])
    forests.shake(model.attach(Bottleneck(size=4).attach(model.sites)).named_parameters().values())
    assert passes(model) == [1, 1, 3]
    model.detach()
    watched = model.module.get_submodule("model.layers.0.mlp")
    assert isinstance(watched, nn.Module)
    watched.register_forward_hook(lambda *_: None)
    assert passes(model) == [1, 1, 3]


def test_pieces_end_at_places_that_the_text_alone_decides() -> None:
    """Breaks when the place that a pass has left decides where a prompt is cut."""
    model = forests.language_model("llama")
    engine = Engine(model, room=Room(tokens=3000, pass_tokens=200))
    reader = engine._gate.reader()
    assert isinstance(reader, PagedReader)
    engine._reader = reader
    engine.add(Request(prompt=TRUNK[:150], sampling=Sampling(max_new_tokens=2)))
    engine.add(asked(6))
    ends = []
    while engine.busy:
        engine.step()
        ends += [each.done for each in reader.scheduler.running if each.request.batch_invariant]
    assert ends[:3] == [PIECE, 190, 191] and all(later - before == 1 for before, later in pairwise(ends[1:]))


def test_what_reads_its_own_words_again_is_not_drafted() -> None:
    """Breaks when a draft stands behind a token that others follow already."""

    class Always(Drafter):
        def said(self, token: int) -> None: ...

        def propose(self, count: int) -> list[int]:
            return [7] * count

    request = replace(asked(2), drafts=4)
    each = Continuation(0, 0, request, limit=20, drafter=Always())
    scheduler = Scheduler(WIDE)
    scheduler.waiting.append(each)
    each.chooser.said.extend([5, 6, 7])
    read = []
    for _ in range(4):
        [part] = scheduler.plan()
        read.append((part.start, part.stop, part.draft))
        scheduler.read(part)
    assert read == [(0, 20, ()), (20, 21, ()), (21, 22, ()), (22, 27, (7,) * 4)]


@pytest.mark.parametrize("adapter", [LoRA(rank=4, targets=("head",)), TrainableTokens(tokens=(5, 6, 7))], ids=str)
def test_it_holds_beside_an_adapter_that_changes_the_head(adapter: Adapter, tmp_path: Path) -> None:
    """Breaks when logits of others, which come in float32, have all of a step add up as floats do."""
    model = forests.language_model("llama", dtype=torch.bfloat16)
    pool = pool_of(model, {"head": saved(tmp_path / "head", adapter, dtype=torch.bfloat16)}, most=4)
    requests = [asked(place) for place in (1, 2, 3, 4)]
    alone = [told(Engine(model, room=WIDE, pool=pool), [request])[0] for request in requests]
    company = [replace(each, adapter="head") for each in others()]
    assert told(Engine(model, room=WIDE, pool=pool), requests, company, ahead=20) == alone


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_it_holds_where_the_angles_of_a_text_depend_on_its_length(kind: longrope.Kind) -> None:
    """Breaks when a token of a short text is turned by the angles of a long one beside it."""
    model = longrope.language_model(kind)
    assert model.keeps_rows_apart(None) == (kind == "llama" and model.executor.backend.few > 0)
    check(model, [asked(place, said=30) for place in (0, 1, 2, 3, 6)])


def test_it_holds_where_a_draft_no_longer_fits() -> None:
    """Breaks when a text that drafts is looked at beside its draft though its rows do not stand apart any more."""
    model = forests.language_model("llama", dtype=torch.bfloat16)
    request = replace(asked(3, said=30), prompt=np.tile(PROMPTS[3][:5], 9), drafts=7)

    def watched(engine: Engine) -> Told:
        number = engine.add(request)
        assert model.keeps_rows_apart(None) == (model.executor.backend.few > 0)
        hook = model.module.get_submodule("model.layers.0.mlp").register_forward_hook(lambda *_: None)
        news: list[News] = []
        while engine.busy:
            news += engine.step()
        hook.remove()
        assert not any(each.failure for each in news) and engine.counts.drafted == 0
        return [[(said.token, said.log_prob, said.likeliest) for each in news if each.request == number
                 for said in each.said]]  # fmt: skip

    crowd = Engine(model, room=WIDE)
    for each in others():
        crowd.add(replace(each, sampling=Sampling(max_new_tokens=40)))
    assert watched(crowd) == watched(Engine(model, room=WIDE))


def test_likeliest_tokens_that_tie_do_not_depend_on_how_many_others_want() -> None:
    """Breaks when the rows of a step are asked for as many tokens as the most curious of them."""
    logits = torch.zeros(3, 300)
    logits[:, ::7] = 1.0
    tokens = torch.zeros(3, dtype=torch.long)
    choosers = [Chooser(Sampling(likeliest=count), PROMPTS[2], choice=0) for count in (5, 40, 5)]
    together = choose(choosers, logits)
    for place, count in enumerate((5, 40, 5)):
        (alone,) = choose([Chooser(Sampling(likeliest=count), PROMPTS[2], choice=0)], logits[place : place + 1])
        assert together[place].likeliest == alone.likeliest and len(alone.likeliest) == count
    assert log_probs_of(logits, tokens, 5)[0].likeliest == together[0].likeliest


def test_texts_whose_tokens_are_passes_of_their_own_take_turns() -> None:
    """Breaks when everybody waits for all of them, or one of them waits for ever; alone nobody waits."""
    model = forests.language_model("gemma")
    engine = Engine(model, room=WIDE)
    numbers = [engine.add(asked(2, said=20)) for _ in range(6)]
    engine.add(replace(others()[0], sampling=Sampling(max_new_tokens=40)))
    while any(not each.said for each in engine._reader.scheduler.running) if engine._reader else True:
        engine.step()
    spoken = [sum(len(news.said) for news in engine.step() if news.request in numbers) for _ in range(4)]
    assert spoken == [6] * 4
    for prompt in COMPANY[:3]:
        engine.add(Request(prompt=prompt[:5], sampling=Sampling(max_new_tokens=40)))
    engine.step()
    said: dict[int, int] = dict.fromkeys(numbers, 0)
    for _ in range(6):
        news = engine.step()
        assert len({each.request for each in news} & set(numbers)) == ALONE
        for each in news:
            if each.request in said:
                said[each.request] += len(each.said)
    assert set(said.values()) == {2}
