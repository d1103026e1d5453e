"""A config without its class: the plain values that the zoo's config of a model had.

Idea: what reads a config asks for numbers and names. The class that makes them out of a config.json, with its defaults
and its checks, brings a thousand modules. So its values are kept, and are a config to whoever only reads. It is always
that of a decoder, whose only task is to go on with a text.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Final, final

from luthier.model.zoo import ZooConfig

_SAYS_NOTHING: Final = frozenset({"id2label", "label2id", "dtype", "name_or_path", "_name_or_path"})
"""Names of classes, which a decoder does not have, and what is chosen anew at each start."""


@final
class OwnConfig:
    """The values of a config as attributes, under the names that its class has for them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(copy.deepcopy(dict(values)))

    def get_text_config(self) -> OwnConfig:
        """Itself: there is no other model inside."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """All values by name."""
        return copy.deepcopy(vars(self))


def plain_values(config: ZooConfig) -> dict[str, Any] | None:
    """What a config of the zoo says, as JSON can keep it; None where it would change a value, or models are nested."""
    if config.get_text_config() is not config or config.sub_configs:
        return None
    names = {field.name for field in dataclasses.fields(config)} | {"model_type", *config.attribute_map}
    names |= {name for name in (*vars(config), *config.to_dict()) if not name.startswith("_")}
    return as_json({name: getattr(config, name) for name in sorted(names - _SAYS_NOTHING)})


def as_json(values: dict[str, Any]) -> dict[str, Any] | None:
    """The values as JSON gives them back; None where it would change one."""
    try:
        kept: dict[str, Any] = json.loads(json.dumps(values))
    except (TypeError, ValueError):
        return None
    return kept if kept == values else None
