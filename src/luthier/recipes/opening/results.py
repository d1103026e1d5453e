"""Where the result of a run is, whole, and where the paths that it keeps lead. Nothing here brings torch.

A run and its result keep paths as they were written, so that they read the same wherever the run lies: relative ones
start at the folder in which the run was started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from luthier.core.errors import CorruptError, RecipeError
from luthier.model.files.sources import FRESH, SEEDLING
from luthier.recipes.schemas.names import AI_FEEDBACK
from luthier.store.manifest import NAME, Manifest, verify
from luthier.store.runs import ADAPTER, MODEL, RunDirectory, is_begun

POLICY: Final = "policy"
"""Where a run of AI feedback keeps what has become of the model: a run of its own."""


def result_of(run: RunDirectory) -> tuple[Path, Manifest]:
    """The folder of a run's result and its manifest, after every byte was read and compared.

    Raises RecipeError when there is no result yet, and CorruptError for one that is not what was saved.
    """
    require_one(run)
    run = of_policy(run)
    folder = next((run.folder / name for name in (MODEL, ADAPTER) if (run.folder / name).is_dir()), None)
    if folder is None:
        raise RecipeError(
            f"{run.folder} has no result yet (its status is {run.status().state})",
            do=f"luthier resume {run.folder}",
        )
    use = f"--adapter {folder} with its base" if folder.name == ADAPTER else f"{folder} itself"
    advice = f"train again, or name {use} if you trust these files as they are"
    if not (folder / NAME).is_file():
        raise CorruptError(f"{folder} has no {NAME}, so nothing says what it must hold", do=advice)
    try:
        return folder, verify(folder)
    except CorruptError as error:
        raise CorruptError(error.received, do=advice) from error


def require_one(run: RunDirectory) -> None:
    """Raise RecipeError for a run of several adapters, whose results are in runs of their own below it."""
    names = run.read_recipe().get("adapters")
    if isinstance(names, dict):
        raise RecipeError(
            f"{run.folder} is a run of several adapters",
            allowed="one of them: " + ", ".join(str(run.folder / str(name)) for name in names),
            do="name that run instead",
        )


def of_policy(run: RunDirectory) -> RunDirectory:
    """The run that a result is in: the run itself, or of one of AI feedback that of its policy.

    Raises RecipeError where that stage has not begun.
    """
    if run.read_recipe().get("recipe") != AI_FEEDBACK:
        return run
    if not is_begun(run.folder / POLICY):
        raise RecipeError(f"{run.folder} has not come to training a policy yet", do=f"luthier resume {run.folder}")
    return RunDirectory.open(run.folder / POLICY)


def started_in(run: RunDirectory) -> Path | None:
    """The folder in which a run was started; None when it does not say or the folder is gone."""
    if not (run.folder / "environment.json").is_file():
        return None
    said = run.read_json("environment.json").get("folder")
    return Path(said) if isinstance(said, str) and Path(said).is_dir() else None


def model_from(source: str, folder: Path | None) -> str:
    """A model's name as it leads from here; hub ids and `seedling` are no paths."""
    name = source.removeprefix(FRESH)
    if folder is None or folder == Path.cwd() or name == SEEDLING or not (folder / name).is_dir():
        return source
    return source.removesuffix(name) + str(folder / name)


def template_from(choice: str, folder: Path | None) -> str:
    """A chat template's name as it leads from here, if it is a path at all."""
    if folder is None or folder == Path.cwd() or not (folder / choice).is_file():
        return choice
    return str(folder / choice)
