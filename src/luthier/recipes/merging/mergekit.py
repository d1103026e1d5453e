"""Recipes of mergekit, read as ours: the subset that people have, and nothing that is passed over without a word.

What is understood: merge_method, models or slices (sources, layer_range, parameters), base_model, parameters with
scalars, lists and filters, dtype, out_dtype, tokenizer_source. Any other key is refused by name. Defaults are
mergekit's where ours differ. What is computed differently: `rescale` of dare and della is by 1 / density, as in their
papers (told); model_stock with a negative mean cosine gives the base, where mergekit goes on beyond it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean
from luthier.recipes.schemas.names import MERGEKIT

_METHODS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "linear": ("linear", {}),
    "slerp": ("slerp", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "ties": ("ties", {"density": 1.0}),
    "dare_linear": ("dare", {"density": 1.0}),
    "dare_ties": ("dare", {"density": 1.0, "fuse": "ties"}),
    "della": ("della", {"density": 1.0, "epsilon": 0.15}),
    "della_linear": ("della", {"density": 1.0, "epsilon": 0.15, "fuse": "linear", "normalize": False}),
    "breadcrumbs": ("breadcrumbs", {"density": 1.0, "gamma": 0.01}),
    "breadcrumbs_ties": ("breadcrumbs", {"density": 1.0, "gamma": 0.01, "fuse": "ties"}),
    "model_stock": ("model_stock", {}),
    "karcher": ("karcher", {}),
    "passthrough": ("passthrough", {}),
}
_KNOBS: Final = {"t": "t", "density": "density", "lambda": "scale", "epsilon": "epsilon", "gamma": "gamma",
                 "normalize": "normalize", "rescale": "rescale", "scale": "scale"}  # fmt: skip
_SWITCHES: Final = ("normalize", "rescale")
_IGNORED: Final = {"int8_mask": "it changes no result"}
_TOP: Final = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")


def is_mergekit(values: Mapping[str, Any]) -> bool:
    """Whether plain values are a recipe of mergekit."""
    return MERGEKIT in values


def translated(values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Our recipe in plain values, and what a user should know. Raises RecipeError that names what is not understood."""
    _only(values, _TOP, "the recipe")
    name = values["merge_method"]
    if name not in _METHODS:
        close = did_you_mean(str(name), _METHODS)
        raise RecipeError(f"merge_method is {name!r}", allowed=", ".join(_METHODS), do=close)
    method, defaults = _METHODS[name]
    if ("models" in values) == ("slices" in values):
        raise RecipeError("models and slices are both there or both missing", allowed="one of the two")
    notes: list[str] = []
    base = values.get("base_model")
    vary = _knobs(values.get("parameters"), "parameters", notes)
    weight = vary.pop("weight", None)
    parents, slices = _parents(values, notes) if "models" in values else _slices(values["slices"], notes)
    parents, base = _with_base(method, parents, base)
    if weight is not None:
        parents = [{"weight": weight, **parent} for parent in parents]
    plain = {**defaults, **{key: vary.pop(key) for key in list(vary) if not isinstance(vary[key], (list, dict))}}
    shared = _own_knobs(parents, plain, vary)
    if ("rescale" in plain or method in ("dare", "della")) and plain.get("density", 1.0) != 1.0:
        notes.append("rescale: what is kept is divided by its chance, as in the papers; mergekit matches L1 norms")
    found = {"recipe": "merge", "models": parents, "method": {"method": method, **plain}, "vary": {**vary, **shared}}
    found |= {"base": base} if base else {}
    found |= {"slices": slices} if slices else {}
    if dtype := values.get("out_dtype") or values.get("dtype"):
        found["dtype"] = dtype
    if (tokens := values.get("tokenizer_source")) is not None:
        if tokens not in ("base", "union"):
            raise RecipeError(f"tokenizer_source is {tokens!r}", allowed="base or union")
        found["tokenizer"] = {"base": "first", "union": "union"}[tokens]
    return found, tuple(notes)


def _parents(values: Mapping[str, Any], notes: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    found = []
    for entry in values["models"]:
        _only(entry, ("model", "parameters"), "models")
        found.append({**_named(entry["model"]), **_knobs(entry.get("parameters"), f"models: {entry['model']}", notes)})
    return found, []


def _slices(entries: Any, notes: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The slices, and the models that they name, in their order."""
    parents: dict[str, dict[str, Any]] = {}
    found = []
    for entry in entries:
        _only(entry, ("sources", "parameters"), "slices")
        sources = []
        for source in entry["sources"]:
            _only(source, ("model", "layer_range", "parameters"), "sources")
            own = _knobs(source.get("parameters"), f"sources: {source['model']}", notes)
            if more := sorted(set(own) - {"weight"}):
                raise RecipeError(f"sources: {source['model']} has {more[0]}", allowed="weight",
                                  do="write other parameters for the slice, or for the recipe")  # fmt: skip
            named = _named(source["model"])
            parents.setdefault(named["model"], named)
            sources.append({"model": named["model"], "layers": source.get("layer_range"), **own})
        vary = _knobs(entry.get("parameters"), "slices", notes)
        if "weight" in vary:
            sources = [{"weight": vary["weight"], **source} for source in sources]
        found.append({"sources": sources, "vary": {key: each for key, each in vary.items() if key != "weight"}})
    return list(parents.values()), found


def _with_base(
    method: str, parents: list[dict[str, Any]], base: Any
) -> tuple[list[dict[str, Any]], str | None]:
    """The models without the base, which stands apart; for slerp it is the end at t = 0."""
    if base is None:
        return parents, None
    if method == "slerp":
        if base not in [parent["model"] for parent in parents]:
            parents = [_named(base), *parents]
        return sorted(parents, key=lambda parent: parent["model"] != base), None
    if method in ("linear", "karcher", "passthrough"):
        # They have no base; there it only says whose config and tokenizer are kept.
        return sorted(parents, key=lambda parent: parent["model"] != base), None
    return [parent for parent in parents if parent["model"] != base], str(base)


def _own_knobs(parents: list[dict[str, Any]], plain: dict[str, Any], vary: dict[str, Any]) -> dict[str, Any]:
    """Take knobs that stand with each model out of them: ours hold for all models, so they must be alike."""
    shared: dict[str, Any] = {}
    for key in sorted({key for parent in parents for key in parent} - {"model", "adapter", "weight"}):
        given = [parent.pop(key, None) for parent in parents]
        if any(each != given[0] for each in given):
            raise RecipeError(f"{key} is {given} by model", allowed="the same for all models")
        if isinstance(given[0], (list, dict)):
            shared[key] = given[0]
            plain.pop(key, None)
        else:
            plain[key] = given[0]
            vary.pop(key, None)
    return shared


def _knobs(values: Any, where: str, notes: list[str]) -> dict[str, Any]:
    """Parameters by our names."""
    found = {}
    for key, value in (values or {}).items():
        if key in _IGNORED:
            notes.append(f"{where}: {key} is passed over: {_IGNORED[key]}")
        elif key == "weight":
            found[key] = value
        elif key in _KNOBS:
            found[_KNOBS[key]] = bool(value) if key in _SWITCHES else value
        else:
            known = ["weight", *_KNOBS]
            raise RecipeError(f"{where} has {key!r}", allowed=", ".join(known), do=did_you_mean(str(key), known))
    return found


def _named(model: Any) -> dict[str, Any]:
    """A model as mergekit names it: with an adapter behind a plus sign."""
    if not isinstance(model, str):
        raise RecipeError(f"a model is {model!r}", allowed="a folder or hub id, and perhaps + and an adapter's folder")
    name, plus, adapter = model.partition("+")
    return {"model": name, **({"adapter": adapter} if plus else {})}


def _only(values: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where} has {values!r:.80}", allowed=f"a mapping with {', '.join(known)}")
    if unknown := [str(key) for key in values if key not in known]:
        raise RecipeError(f"{where} of mergekit has the key {unknown[0]!r}", allowed=", ".join(known),
                          do=f"take it out, or write the recipe anew ({did_you_mean(unknown[0], known)})")  # fmt: skip
