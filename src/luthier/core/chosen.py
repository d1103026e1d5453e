"""The method that a recipe chooses: from a mapping, a bare name or an object to the object.

A recipe names a method by `method` and gives its knobs beside it (`{method: lora, rank: 16}`); `Chosen("adapters")` on
a field turns that mapping into the object, importing only the file of the method that was named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from luthier.core import catalog
from luthier.core.errors import RecipeError
from luthier.core.knobs import Chooser, Method, validate

Kind = TypeVar("Kind", bound=Method)


@dataclass(frozen=True)
class Chosen(Chooser):
    """Annotation of a recipe field that holds a method of `family`: `Annotated[Adapter, Chosen("adapters")]`."""

    family: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.choose,
            serialization=core_schema.plain_serializer_function_ser_schema(Method.as_recipe),
        )

    def choose(self, value: Any) -> Method:
        """The method object that a mapping, a bare name or an object of the family stands for."""
        if isinstance(value, Method):
            return value
        kind = self.kind_of(value)
        knobs = {key: item for key, item in value.items() if key != "method"} if isinstance(value, Mapping) else {}
        method = validate(kind, knobs, where=kind.method_name())
        if not isinstance(method, Method):
            raise TypeError(f"{kind} is not a Method")
        return method

    def kind_of(self, value: Any) -> type[Method]:
        """The class of the method that a value stands for; its file alone is imported."""
        if isinstance(value, Method):
            return type(value)
        name = value.get("method") if isinstance(value, Mapping) else value
        if not isinstance(name, str):
            raise RecipeError(
                f"{self.family}: {value!r} does not say which method",
                allowed=f"a mapping with method: {' | '.join(catalog.names(self.family))}",
                do=f"for example {{method: {catalog.names(self.family)[0]}}}",
            )
        return catalog.load(self.family, name)


def choose(family: str, base: type[Kind], value: Any) -> Kind:
    """The method of `family` that `value` (a name, a mapping, or the object itself) stands for."""
    method = Chosen(family).choose(value)
    if not isinstance(method, base):
        raise RecipeError(f"{method.method_name()} is no {base.__name__.lower()}")
    return method
