"""How long a text may be for a model. Light: where the model's own file says it, nothing of the zoo is imported.

Idea: commands that only look at data need one number of a model. Its config class would read that number from
config.json as it stands, and importing the class takes longer than all else that such a command does. The class is
asked where the file does not say it, or where the file holds the configs of several models in one.
"""

from __future__ import annotations

from collections.abc import Mapping

from luthier.data.hub import ModelFiles
from luthier.model.files.sources import resolve_source

_LIMIT = "max_position_embeddings"
_NESTED = ("config", "coder", "generator")
"""How keys end that hold the config of a model inside another (text_config, decoder, text_encoder, generator)."""


def context_tokens(source: str) -> int | None:
    """The longest sequence that the config of a model allows for, without loading its weights."""
    config = ModelFiles.of(resolve_source(source)).json("config.json")
    said = config.get(_LIMIT)
    several = any(isinstance(value, Mapping) and key.endswith(_NESTED) for key, value in config.items())
    if not several and type(said) is int and said > 0:
        return said
    # The zoo, which brings torch.
    from luthier.model.files.configs import config_of

    limit = getattr(config_of(source).get_text_config(), _LIMIT, None)
    return int(limit) if limit else None
