"""What a model's name stands for: a folder, a hub id, the model that ships with luthier. Light: nothing is loaded."""

from __future__ import annotations

from pathlib import Path

from luthier.core.errors import MissingError, RecipeError
from luthier.core.nearest import nearest
from luthier.data.hub import ModelFiles, no_model_but

FRESH = "fresh:"
"""A source with this prefix is a folder whose config is used and whose weights are drawn anew."""

SEEDLING = "seedling"


def resolve_source(source: str) -> str:
    """The folder or hub id behind a model name: `seedling` is the folder that ships with luthier."""
    name = source.removeprefix(FRESH)
    if name == SEEDLING:
        return str(Path(__file__).resolve().parents[2] / "assets" / "seedling")
    place = Path(name).expanduser()
    if place.is_file():
        of_a_model = place.suffix in (".safetensors", ".json")
        do = f"name the folder it lies in: {place.parent}" if of_a_model else "name a folder that holds a config.json"
        raise MissingError(f"{name} is a file", allowed="a model folder, a hub id, or seedling", do=do)
    if place.exists():
        return str(place)
    # A hub id has one slash at most; anything else can only have meant a folder.
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        beside = [path.name for path in place.parent.iterdir() if path.is_dir()] if place.parent.is_dir() else []
        close = nearest(place.name, beside)
        do = f"did you mean {' or '.join(close)}?" if close else "check the path; a hub id has the form owner/name"
        raise MissingError(f"there is no model folder {name}", do=do)
    # A hub id of a new repository has an owner: a bare name that is nearly ours needs no look at the hub.
    if "/" not in name and nearest(name, [SEEDLING], cutoff=0.8):
        raise RecipeError(f"there is no {name}", do="did you mean seedling?")
    return name


def without_config(name: str, files: ModelFiles) -> RecipeError:
    """What to say of a model that was found, or may be on the hub, and has no config."""
    usual = "name a folder in the Hugging Face layout, a hub id, or seedling"
    return RecipeError(f"{name} has no config.json", do=no_model_but(files) or usual)
