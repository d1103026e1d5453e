"""What is checked of a run's result, read from its files alone, in the order in which doubts arise.

Are the bytes those that were written; is it this run's, of this recipe; can its tokenizer be read; is the base the one
it was trained on; does every tensor find its place and every place its tensor, all finite; do they differ from their
start; and does the held-out loss come out again. What the run itself said of all this is in `claims.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from luthier.adapters import saved_adapter
from luthier.core.errors import CorruptError, DriftError, GateError, NumericError
from luthier.core.knobs import validate
from luthier.data.tokenizer import Tokenizer
from luthier.model.files.adapter_config import CONFIG, EXTRAS, read_config, read_extras
from luthier.model.files.adapter_files import beside, fill
from luthier.model.files.generation_files import GENERATION, read_stop_ids
from luthier.model.files.tensor_files import each_tensor
from luthier.model.language_model import LanguageModel
from luthier.model.load import Precision, resolve_source
from luthier.recipes.bench import reading_of
from luthier.recipes.control_tokens import with_token_ids
from luthier.recipes.evaluating.evaluate import held_out_of
from luthier.recipes.measuring import mean_loss
from luthier.recipes.opening.places import located
from luthier.recipes.opening.purpose import bound, kept_task
from luthier.recipes.opening.quantized import load_base, quantize
from luthier.recipes.opening.results import of_policy, result_of, started_in
from luthier.recipes.proving.claims import changes, data_facts, fingerprint, recipe_digest
from luthier.recipes.reinforcing.reinforce import HeldOut
from luthier.recipes.reinforcing.tools import scoring_of
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.kinds import kind_of_recipe
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.recipes.sizing.accounts import LIBRARIES
from luthier.recipes.teacher import reference_of
from luthier.store.environment import processor
from luthier.store.runs import MODEL, RunDirectory
from luthier.train.result import release

LOSS_TOLERANCE = 1e-5
"""Relative difference allowed between the loss reported and that of the files; the bytes of the weights are equal."""
NEAR_ZERO = 1e-6
"""A difference below this is rounding, however small the losses are."""
_CLAIMS = {"base", "base_digest", "data", "eval_loss", "format", "held_out", "last_loss", "made_with", "micro_tokens",
           "name", "precision", "recipe", "run", "steps", "stop_ids", "trained_tokens"}  # fmt: skip


_Opened = tuple[LanguageModel, int, LanguageModel | None]
"""A result from its files, the number of its tensors, and its reference where that is another model."""


def prove(run: RunDirectory) -> dict[str, Any]:
    """All checks, or the first error; see `recipes/proving/verify.py`."""
    began = time.perf_counter()
    run = of_policy(run)
    folder, manifest = result_of(run)
    facts = manifest.facts
    _check_claims(run, folder, facts)
    values = run.read_recipe()
    recipe = located(validate(kind_of_recipe(values), values), started_in(run))
    tokenizer = Tokenizer.load(resolve_source(recipe.model))
    _check_tokenizer(folder, tokenizer, facts)
    named = with_token_ids(recipe.adapter, tokenizer, facts["stop_ids"])
    objective = bound(recipe.objective, recipe.model, tokenizer)
    recipe = recipe.model_copy(update={"adapter": named, "objective": objective})
    notices: list[str] = []
    with _as_recorded(facts):
        opened = _whole_model if folder.name == MODEL else _adapted_base
        model, count, reference = opened(folder, recipe, facts)
        reloaded = _check_loss(model, recipe, facts, notices, reference)
    held = facts["held_out"]
    return {
        "run": str(run.folder),
        "result": str(folder),
        "files": len(manifest.files),
        "bytes": manifest.total_bytes,
        "base": recipe.model,
        "base_digest": facts["base_digest"],
        "tokenizer_digest": tokenizer.digest,
        "tensors": count,
        "differs_from_start": True,
        "trained_tokens": facts["trained_tokens"],
        "held_out_rows": held["rows"],
        "held_out_tokens": held["tokens"],
        "eval_loss": facts["eval_loss"],
        "reloaded_loss": reloaded,
        "notices": notices,
        "process": "this",
        "seconds": round(time.perf_counter() - began, 3),
    }


# ------------------------------------------------------------------------------------------------------ what is said


def _check_claims(run: RunDirectory, folder: Path, facts: Mapping[str, Any]) -> None:
    """The manifest is of this run and this recipe, and claims nothing that no run may claim."""
    missing = _CLAIMS - set(facts)
    if missing:
        raise CorruptError(f"the manifest of {folder} does not say {', '.join(sorted(missing))}")
    if facts["run"] != run.run_id:
        raise CorruptError(
            f"{folder} is the result of run {facts['name']} ({str(facts['run'])[:8]}), not of {run.run_id[:8]}",
            do="name the run it belongs to",
        )
    if facts["recipe"] != recipe_digest(run):
        raise DriftError(
            f"{run.folder / 'recipe.yaml'} is not the recipe that this result was made with",
            do="take it back to what it was; a changed recipe is another run",
        )
    for name in ("last_loss", "eval_loss"):
        if facts[name] is not None and not (isinstance(facts[name], float) and math.isfinite(facts[name])):
            raise NumericError(f"the {name} that {folder} was saved with is {facts[name]}")
    if facts["trained_tokens"] <= 0:
        raise GateError(f"{folder} was saved after {facts['trained_tokens']} trained tokens")
    if read_extras(folder).get("stop_ids") != facts["stop_ids"]:
        raise CorruptError(f"{folder / EXTRAS} does not stop at {facts['stop_ids']}, where the run's rows end")


# ---------------------------------------------------------------------------------------------------------- tokenizer


def _check_tokenizer(folder: Path, base: Tokenizer, facts: Mapping[str, Any]) -> None:
    """The tokenizer beside the result can be read, and is the base's."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as failure:
            raise CorruptError(f"{path} is not valid JSON: {failure}") from None
    if base.digest != facts["made_with"]["tokenizer"]:
        raise DriftError(
            f"the base's tokenizer has digest {base.digest[:12]}, the run's had {facts['made_with']['tokenizer'][:12]}",
            do="load the base model it was trained on",
        )
    saved = Tokenizer.load(folder)
    if saved.vocabulary != base.vocabulary or saved.special_ids != base.special_ids:
        raise CorruptError(f"{folder} holds a tokenizer of {saved.vocabulary_size} tokens that is not the base's")
    if beyond := [token for token in facts["stop_ids"] if not 0 <= token < saved.vocabulary_size]:
        raise CorruptError(f"{folder} stops at {beyond}", allowed=f"tokens 0 to {saved.vocabulary_size - 1}")
    speaks = kept_task(read_extras(folder)).speaks
    if speaks and facts["stop_ids"] and (stops := read_stop_ids(folder)) != set(facts["stop_ids"]):
        raise CorruptError(
            f"{folder / GENERATION} stops at {sorted(stops)}", allowed=f"{facts['stop_ids']}, where the run's rows end"
        )


# ------------------------------------------------------------------------------------------------------------ weights


def _adapted_base(folder: Path, recipe: FinetuneRecipe, facts: Mapping[str, Any]) -> _Opened:
    """The base with the adapter from its files on it, and the number of its tensors; it is its own reference."""
    model = _base(folder, recipe, facts)
    torch.manual_seed(recipe.seed)
    start = model.attach(recipe.adapter.attach(model.sites))
    fresh, expected = start.trained_digest(), _shapes(start.named_tensors())
    model.detach()
    if (saved := _saved_tensors(folder)) != expected:
        raise _other_tensors(folder, expected, saved)
    _check_config(folder, {**recipe.adapter.peft_config(model.sites), **beside(start)}, recipe, str(facts["base"]))
    attachment = model.attach(saved_adapter(folder, model.sites).attach(model.sites))
    if (found := _shapes(attachment.named_tensors())) != expected:
        raise _other_tensors(folder, expected, found)
    fill(attachment, folder)
    if attachment.trained_digest() == fresh:
        raise GateError(f"the adapter in {folder} is exactly what it was at the start", do="train it again")
    return model, len(found), None


def _check_config(folder: Path, own: Mapping[str, Any], recipe: FinetuneRecipe, base: str) -> None:
    """The adapter's configuration says what the recipe says: `own` is the method's part of it."""
    said = read_config(folder)
    named = {"peft_type": recipe.adapter.peft_type, "base_model_name_or_path": base}
    for key, value in json.loads(json.dumps({**named, **own})).items():
        if key not in said or said[key] != value:
            raise CorruptError(f"{folder / CONFIG} says {key} = {said.get(key)!r}", allowed=f"{value!r}, by the recipe")


def _whole_model(folder: Path, recipe: FinetuneRecipe, facts: Mapping[str, Any]) -> _Opened:
    """The trained model from its files, and the number of its tensors.

    Base and result are not held at once, unless one is the reference of the other.
    """
    from transformers.core_model_loading import revert_weight_conversion

    from luthier.model.zoo_again import zoo_module

    base = _base(folder, recipe, facts)
    expected, before = _shapes(base.module.state_dict()), _digests(base)
    # The zoo fuses some weights in memory (experts) and takes them apart again in its files.
    files = dict(revert_weight_conversion(zoo_module(base.module), base.module.state_dict()))
    wanted = _shapes(files)
    names: dict[int, set[str]] = {}
    for name, tensor in files.items():
        names.setdefault(tensor.data_ptr(), set()).add(name)
    del files
    if not _refers(recipe):
        release(base)
    saved = _saved_tensors(folder)
    # A tied tensor is saved once, under whichever of its names the zoo chose.
    lost = {name for same in names.values() if not same & set(saved) for name in same}
    if lost or any(wanted.get(name) != shape for name, shape in saved.items()):
        known = {name: shape for name, shape in wanted.items() if name in saved or name in lost}
        raise _other_tensors(folder, known, saved)
    task = kept_task(read_extras(folder))
    model = load_base(
        str(folder), precision=_precision(facts), device=_device(recipe, facts), task=task, own_modules=True
    )
    if (found := _shapes(model.module.state_dict())) != expected:
        raise _other_tensors(folder, expected, found)
    if _digests(model) == before:
        raise GateError(f"the weights in {folder} are exactly those of the base", do="train it again")
    return model, len(saved), base if _refers(recipe) else None


def _refers(recipe: FinetuneRecipe) -> bool:
    """Whether what the model was before is asked for its word, so that both have to be there."""
    return recipe.reference.model is None and (recipe.objective.reference or recipe.objective.taught)


def _base(folder: Path, recipe: FinetuneRecipe, facts: Mapping[str, Any]) -> LanguageModel:
    """The base of the run, with the very weights it was trained on."""
    precision, task = _precision(facts), kept_task(read_extras(folder))
    model = load_base(
        recipe.model, precision=precision, device=_device(recipe, facts), seed=recipe.seed, task=task, own_modules=True
    )
    for said in (facts["base_digest"], read_extras(folder).get("base_digest", model.digest)):
        if said != model.digest:
            raise DriftError(
                f"{folder} was trained on base weights {str(said)[:12]}..., {recipe.model} has {model.digest[:12]}...",
                do="load the base model it was trained on",
            )
    quantize(model, recipe.quantizer)
    return model


def _saved_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the weight files of a folder. Raises NumericError for what is not finite."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in each_tensor(path):
            if name in found:
                raise CorruptError(f"{path} holds {name}, and so does another file beside it")
            if not bool(torch.isfinite(tensor).all()):
                raise NumericError(f"{name} in {path} holds numbers that are not finite")
            found[name] = tuple(tensor.shape)
    return found


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _digests(model: LanguageModel) -> dict[str, str]:
    return {name: _digest(tensor) for name, tensor in model.module.state_dict().items()}


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _other_tensors(
    folder: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> CorruptError:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    shaped = [name for name in sorted(set(found) & set(expected)) if found[name] != expected[name]]
    return CorruptError(
        f"{folder}: {len(missing)} expected tensors are missing ({', '.join(missing[:2])}), {len(unknown)} have no "
        f"place ({', '.join(unknown[:2])}) and {len(shaped)} another shape ({', '.join(shaped[:2])})",
        do="the files are not those of this run; train it again",
    )


# --------------------------------------------------------------------------------------------------------------- loss


def _check_loss(
    model: LanguageModel,
    recipe: FinetuneRecipe,
    facts: Mapping[str, Any],
    notices: list[str],
    reference: LanguageModel | None,
) -> float | None:
    """The held-out loss of the files, which must be the one that the run reported; None without held-out rows."""
    recorded = facts["eval_loss"]
    if recorded is None:
        notices.append("nothing was held out, so no loss could be computed again")
        return None
    data, trees = held_out_of(recipe)
    found = fingerprint(trees)
    differing = changes(facts["data"], data_facts(data))
    if found != facts["held_out"]:
        raise DriftError(
            f"the held-out rows are not those that the run was evaluated on: {'; '.join(differing)}; "
            f"{facts['held_out']['rows']} rows with {facts['held_out']['tokens']} trained tokens "
            f"({facts['held_out']['digest'][:12]}) then, {found['rows']} with {found['tokens']} "
            f"({found['digest'][:12]}) now",
            do="put the data back as it was; its loss on other rows says luthier eval RUN --data FILE",
        )
    notices += [f"since the run, {change}; the held-out rows are the same" for change in differing]
    # A run that had to cut its micro-batches smaller on its way was evaluated with either size.
    sizes = dict.fromkeys([int(facts["micro_tokens"]), recipe.batch.micro_tokens])
    told = reference_of(recipe, data, base=reference)
    losses = []
    for size in sizes:
        if isinstance(recipe, ReinforceRecipe):
            # What was held out has rewards, not a loss: its prompts are answered again.
            reading, tokenizer = reading_of(recipe), data.renderer.tokenizer
            held = HeldOut.of(
                recipe, data, reading, tokenizer, model, scoring=scoring_of(recipe), reference=told
            )
            losses.append(held.measured().loss)
        else:
            losses.append(mean_loss(model, recipe.objective, trees, micro_tokens=size, reference=told)[0])
        if math.isclose(losses[-1], recorded, rel_tol=LOSS_TOLERANCE, abs_tol=NEAR_ZERO):
            return losses[-1]
    other = _environment(facts, model)
    raise GateError(
        f"the saved result has a held-out loss of {losses[0]!r}, the run reported {recorded!r}"
        f"{'; since then ' + ', '.join(other) if other else ''}",
        allowed=f"a relative difference of {LOSS_TOLERANCE}",
        do="check it where it was made" if other else "do not use it; report this with the run's recipe.yaml",
    )


# -------------------------------------------------------------------------------------------------------- environment


@contextmanager
def _as_recorded(facts: Mapping[str, Any]) -> Iterator[None]:
    """Compute with as many threads as the run did, and leave this process's threads and random numbers as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(int(facts["made_with"]["threads"]))
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def _device(recipe: FinetuneRecipe, facts: Mapping[str, Any]) -> str:
    recorded = str(facts["made_with"]["device"])
    return recipe.device if recipe.device.partition(":")[0] == recorded else recorded


def _precision(facts: Mapping[str, Any]) -> Precision:
    known: tuple[Precision, ...] = ("float32", "bfloat16")
    found = next((each for each in known if each == facts["precision"]), None)
    if found is None:
        raise CorruptError(f"the manifest says precision {facts['precision']!r}", allowed=" | ".join(known))
    return found


def _environment(facts: Mapping[str, Any], model: LanguageModel) -> list[str]:
    """What computes otherwise here than it did in the run."""
    now = {"processor": processor(), "kernels": model.kernels, **{name: metadata.version(name) for name in LIBRARIES}}
    made = facts["made_with"]
    return [f"{name} {made.get(name)} -> {value}" for name, value in now.items() if made.get(name) != value]
