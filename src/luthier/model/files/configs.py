"""What the config of a model says, through the gate and without loading its weights."""

from __future__ import annotations

from luthier.data.hub import ModelFiles
from luthier.model.files.checked import Checked
from luthier.model.files.sources import resolve_source, without_config
from luthier.model.zoo import ZooConfig


def config_of(source: str) -> ZooConfig:
    """The config of a model, through the gate, without loading its weights."""
    return checked_config(ModelFiles.of(resolve_source(source)), quantized=True).config


def checked_config(files: ModelFiles, *, quantized: bool) -> Checked:
    """The config among a model's files, through the gate."""
    # The gate makes a config of the zoo, and brings it.
    from luthier.model.files.config_gate import read_config

    path = files.find("config.json")
    if path is None:
        raise without_config(files.source, files)
    return read_config(path, quantized=quantized)


def start_token(source: str) -> int | None:
    """The token that a decoder's answers start with, by the files of an encoder-decoder: one of them says it."""
    said = ModelFiles.of(resolve_source(source)).json("generation_config.json") or {}
    found = said.get("decoder_start_token_id", getattr(config_of(source), "decoder_start_token_id", None))
    return int(found) if isinstance(found, int) else None
