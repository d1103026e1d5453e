"""The stream against whole tensors: any method, any room, any number of threads; and what it holds at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from luthier.core import catalog
from luthier.core.errors import NumericError, RecipeError
from luthier.maths.numbered_draws import key_of
from luthier.merge.parents import Parent, require_alike
from luthier.merge.plan import Plan, Slice, Wanted, plan
from luthier.merge.settings import Setting
from luthier.merge.stream import Room, stream
from luthier.mergers import Part
from luthier.model.files.array_views import array_type
from luthier.model.files.shards import SINGLE, ShardWriter
from tests.merge.models_of import LAYERS, WIDTH, folder, tensors
from tests.mergers_of import merge_whole, merger

MEGA = 10**6
AMPLE = Room(100 * MEGA, 2)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three tunes and their base: one in bfloat16, one in several files."""
    home = tmp_path_factory.mktemp("parents")
    return [
        folder(home / "one", tensors(seed=1)),
        folder(home / "two", tensors(seed=2), shard_bytes=600),
        folder(home / "three", tensors(seed=3), dtype=torch.bfloat16),
        folder(home / "base", tensors(seed=0)),
    ]


def merged(
    places: list[Path], out: Path, name: str, *, models: int = 2, base: bool = True, room: Room = AMPLE,
    dtype: torch.dtype = torch.float32, vary: dict[str, Any] | None = None, slices: tuple[Slice, ...] = (),
    weights: tuple[Any, ...] = (), read: bool = True, **knobs: Any,
) -> tuple[dict[str, torch.Tensor], Any, Plan]:
    """The tensors of a merge of the first of `places` and the last, its base, with what is told."""
    chosen = [*places[:models], *([places[-1]] if base else [])]
    parents = [Parent.open(place.name, str(place)) for place in chosen]
    wanted = Wanted(
        merger(name, **knobs), tuple(range(models)), models if base else None,
        tuple(Setting.of(weight, "weight") for weight in weights or (1.0,) * models), array_type(dtype),
        {key: Setting.of(value, key) for key, value in (vary or {}).items()}, slices,
    )
    planned = plan(parents, wanted)
    out.mkdir()
    with ShardWriter(out, planned.slots) as writer:
        reports = stream(parents, planned, writer, room)
    for parent in parents:
        parent.shards.close()
    return load_file(out / SINGLE) if read else {}, {report.name: report for report in reports}, planned


@pytest.mark.parametrize("name", catalog.names("mergers"))
def test_a_stream_is_the_method_on_whole_tensors(places: list[Path], tmp_path: Path, name: str) -> None:
    """Breaks when a block is at another place, a look is forgotten, or the base is taken for a model."""
    fewest, most = merger(name).models
    count = max(fewest, min(3, most or 3))
    found, _, planned = merged(places, tmp_path / "out", name, models=count, room=Room(40_000, 2))
    held = [tensors(seed=seed) for seed in (1, 2, 3)]
    held[2] = {key: tensor.bfloat16().float() for key, tensor in held[2].items()}
    base = tensors(seed=0)
    assert found.keys() == base.keys()
    for key in found:
        rows = [model[key].reshape(-1, model[key].shape[-1]) for model in held[:count]]
        own = base[key].reshape(-1, base[key].shape[-1])
        arrays = tuple(each.numpy() for each in rows)
        part = Part(arrays, own.numpy(), (1.0,) * count, 0, own.numel(), key_of(key))
        torch.testing.assert_close(found[key].reshape(own.shape), merge_whole(merger(name), part), msg=key)
    assert planned.layers == LAYERS


@pytest.mark.parametrize("name", ["slerp", "ties", "dare"])
@pytest.mark.parametrize("room", [Room(40_000, 1), Room(200_000, 3), Room(10**9, 2)])
def test_room_and_threads_change_nothing(places: list[Path], tmp_path: Path, name: str, room: Room) -> None:
    """Breaks when what is kept between looks is changed in place, or blocks come back out of order.

    Sums over other blocks round otherwise, so an angle may differ in its last bit.
    """
    few, _, _ = merged(places, tmp_path / "few", name, room=room)
    many, _, _ = merged(places, tmp_path / "many", name, room=Room(50_000, 2))
    bits = {"rtol": 1e-6, "atol": 1e-7} if name == "slerp" else {"rtol": 0.0, "atol": 0.0}
    for key in many:
        torch.testing.assert_close(few[key], many[key], **bits)
    again, _, _ = merged(places, tmp_path / "again", name, room=room)
    assert all(torch.equal(few[key], again[key]) for key in few)


def test_numbers_are_rounded_once_and_to_the_type_that_is_asked_for(places: list[Path], tmp_path: Path) -> None:
    """Breaks when blocks are merged in half precision."""
    whole, _, _ = merged(places, tmp_path / "whole", "linear")
    for dtype in (torch.bfloat16, torch.float16):
        half, _, _ = merged(places, tmp_path / str(dtype), "linear", dtype=dtype)
        assert all(torch.equal(half[key], whole[key].to(dtype)) for key in whole)


def test_weights_and_knobs_follow_layers_and_roles(places: list[Path], tmp_path: Path) -> None:
    """Breaks when a rule is read for another tensor than its own."""
    rules = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "embed", "value": 0}, {"value": 1}]
    found, reports, _ = merged(places, tmp_path / "out", "slerp", base=False, vary={"t": rules})
    one, two = tensors(seed=1), tensors(seed=2)
    for key in found:
        expected = {"model.embed_tokens.weight": one, "model.layers.0.self_attn.q_proj.weight": one}.get(key, two)
        if key != "model.layers.1.self_attn.q_proj.weight":
            assert torch.equal(found[key], expected[key]), key
    assert reports["model.layers.1.self_attn.q_proj.weight"].told["t"] == 0.5
    rules = [{"filter": "down", "value": 0}, {"value": 1}]
    found, _, _ = merged(places, tmp_path / "by", "linear", base=False, weights=(rules, 1))
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], two["model.layers.1.mlp.down_proj.weight"])
    assert not torch.equal(found["lm_head.weight"], two["lm_head.weight"])
    with pytest.raises(RecipeError, match="slerp has no knob 'density'"):
        merged(places, tmp_path / "no", "slerp", vary={"density": 0.5})


def test_what_is_told_of_a_tensor_is_what_it_is(places: list[Path], tmp_path: Path) -> None:
    """Breaks when a cosine is of weights where there is a base, or a change is measured against the wrong model."""
    key = "model.layers.2.mlp.down_proj.weight"
    one, two, base = (tensors(seed=seed)[key] for seed in (1, 2, 0))
    for name, based in (("linear", True), ("slerp", False), ("ties", True)):
        found, reports, _ = merged(places, tmp_path / name, name, base=based)
        reference, pair = (base, (one - base, two - base)) if based else (one, (one, two))
        report = reports[key]
        assert report.change == pytest.approx(float((found[key] - reference).norm() / reference.norm()), rel=1e-4)
        cosine = torch.cosine_similarity(pair[0].flatten(), pair[1].flatten(), 0)
        assert report.cosine == pytest.approx(float(cosine), abs=1e-5)
        conflict = float(((one - base) * (two - base) < 0).float().mean()) if based else None
        assert report.conflict == conflict


def test_a_stack_of_layers_takes_each_from_where_it_is_said(places: list[Path], tmp_path: Path) -> None:
    """Breaks when layers are numbered from their parent, or the head is the first slice's."""
    slices = (Slice(2, ((0, 0),)), Slice(2, ((1, 1),)))
    found, _, planned = merged(places, tmp_path / "out", "passthrough", base=False, slices=slices)
    one, two = tensors(seed=1), tensors(seed=2)
    assert planned.layers == 4
    for layer, (model, own) in enumerate([(one, 0), (one, 1), (two, 1), (two, 2)]):
        for part in ("self_attn.q_proj.weight", "input_layernorm.weight"):
            assert torch.equal(found[f"model.layers.{layer}.{part}"], model[f"model.layers.{own}.{part}"])
    assert torch.equal(found["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], two["lm_head.weight"])
    assert len(found) == 3 + 4 * 3
    slices = (Slice(2, ((0, 0), (1, 1)), {"t": Setting.of(1, "t")}),)
    found, _, _ = merged(places, tmp_path / "two", "slerp", base=False, slices=slices)
    assert torch.equal(found["model.layers.0.mlp.down_proj.weight"], two["model.layers.1.mlp.down_proj.weight"])


def other(place: Path, change: dict[str, torch.Tensor | None]) -> Path:
    held = {**tensors(seed=4), **change}
    return folder(place, {key: tensor for key, tensor in held.items() if tensor is not None})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.norm.weight": torch.ones(9)}, r"model.norm.weight.* is \[8\] in one and \[9\] in odd"),
        ({"model.norm.weight": None}, "one has .*model.norm.weight.*, which odd does not"),
        ({"more.weight": torch.ones(1)}, "odd has .*more.weight.*, which one does not"),
        ({"lm_head.weight": None}, "one of them ties its head"),
        ({"model.norm.weight": torch.ones(8, dtype=torch.int32)}, "is .* in one and .* in odd"),
    ],
)
def test_models_of_other_shapes_are_a_sentence(
    places: list[Path], tmp_path: Path, change: dict[str, torch.Tensor | None], said: str
) -> None:
    """Breaks when a tensor is left out, or broadcast."""
    with pytest.raises(RecipeError, match=said):
        merged([places[0], other(tmp_path / "odd", change)], tmp_path / "out", "slerp", base=False)


@pytest.mark.parametrize("name", ["linear", "slerp", "ties"])
def test_a_tensor_that_is_not_finite_is_named(places: list[Path], tmp_path: Path, name: str) -> None:
    """Breaks when NaN is merged, or zero weight hides it from one method and not from another."""
    bad = tensors(seed=4)["lm_head.weight"].clone()
    bad[3, 2], bad[4, 1] = float("nan"), float("inf")
    odd = other(tmp_path / "odd", {"lm_head.weight": bad})
    with pytest.raises(NumericError, match=r"lm_head.weight.* of odd has 2 numbers that are not finite"):
        merged([places[0], odd, places[-1]], tmp_path / "out", name, room=Room(10**6, 2))


@pytest.mark.parametrize("name", ["ties", "dare", "della", "breadcrumbs"])
def test_what_is_no_number_is_named_although_changes_are_dropped(places: list[Path], tmp_path: Path, name: str) -> None:
    """Breaks when a method that leaves numbers out leaves out that one, and a broken model is merged without a word."""
    bad = tensors(seed=4)["lm_head.weight"].clone()
    bad[3, 2] = float("nan")
    odd = other(tmp_path / "odd", {"lm_head.weight": bad})
    with pytest.raises(NumericError, match=r"lm_head.weight.* of odd has 1 numbers that are not finite"):
        merged([places[0], odd, places[-1]], tmp_path / "out", name)


def test_numbers_too_large_for_float16_are_told(places: list[Path], tmp_path: Path) -> None:
    """Breaks when a merge overflows to infinity without a word."""
    large = other(tmp_path / "large", {"lm_head.weight": torch.full((12, WIDTH), 1e5)})
    with pytest.raises(NumericError, match="up to 1e"):
        merged([large, large], tmp_path / "out", "linear", base=False, dtype=torch.float16)


def test_whole_numbers_are_copied_where_they_are_alike(tmp_path: Path) -> None:
    """Breaks when an index is averaged."""
    one, two = ({**tensors(seed=seed), "mask": torch.tensor([1, 2, third])} for seed, third in ((1, 3), (2, 3)))
    places = [folder(tmp_path / "a", one), folder(tmp_path / "b", two)]
    found, reports, _ = merged(places, tmp_path / "out", "linear", base=False)
    assert found["mask"].tolist() == [1, 2, 3] and "mask" not in reports
    places.append(folder(tmp_path / "c", {**two, "mask": torch.tensor([1, 2, 4])}))
    with pytest.raises(RecipeError, match="mask.* holds whole numbers, which differ between a and c"):
        merged([places[0], places[2]], tmp_path / "no", "linear", base=False)


def test_a_room_too_small_for_a_row_is_told(places: list[Path], tmp_path: Path) -> None:
    """Breaks when the memory that is stated is exceeded instead."""
    with pytest.raises(RecipeError, match="a row of 8 numbers of 3 models needs"):
        merged(places, tmp_path / "out", "linear", room=Room(1000, 2))


def test_no_more_is_held_than_is_stated(places: list[Path], tmp_path: Path) -> None:
    """Breaks when a tensor is read whole (16 MB, 32 in float32, of three models), or waits without a limit.

    Beside the room there are the heaps of threads and what ties counts of each model.
    """
    held = {"model.layers.0.mlp.up_proj.weight": torch.zeros(8_000_000 // 512, 512, dtype=torch.bfloat16)}
    large = [folder(tmp_path / name, held, dtype=torch.bfloat16) for name in ("a", "b", "base")]
    del held
    room = Room(10 * MEGA, 2)
    for name in ("slerp", "ties"):
        merged(places, tmp_path / f"first-{name}", name, room=room)
        _forget_peak()
        before = _memory("VmRSS")
        merged(large, tmp_path / name, name, room=room, dtype=torch.bfloat16, read=False)
        assert _memory("VmHWM") - before < room.memory_bytes + 14 * MEGA


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as failure:
        pytest.skip(f"the peak of memory cannot be reset here: {failure}")


def _memory(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def test_one_base_of_positions_in_the_words_of_either_line_of_transformers_is_the_same(tmp_path: Path) -> None:
    """Breaks when a model and its fine-tune, saved by another version, are said to differ; or when they do, unsaid."""
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    configs = {"new": new, "old": old, "both": {**old, **new}, "other": {**old, "rope_theta": 1e4}}
    held = {"model.norm.weight": torch.zeros(WIDTH)}
    folders = {name: folder(tmp_path / name, held, config=config) for name, config in configs.items()}
    first, same, both, other = (Parent.open(name, str(place)) for name, place in folders.items())
    assert require_alike([first, same, both]) == require_alike([same, both, first]) == ()
    (notice,) = require_alike([first, other])
    assert notice == "config: rope_theta of other and new differ; the latter's hold"
