"""Quantizers: the frozen weights of a base model in fewer bits.

The contract: a quantizer packs a matrix and says how many bytes that takes, which is tested against the tensors it
makes. It never sees a model, an adapter or an optimizer; `model/packed.py` puts what it packs where the weight was, and
unpacks it where it is multiplied. Embeddings, norms and the head stay as they are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

from jaxtyping import Float
from torch import Tensor

from luthier.core.knobs import Method
from luthier.kernels.backend import Backend
from luthier.model.packed import Packing


class Quantizer(Method):
    """A way to keep a frozen matrix."""

    file_mark: ClassVar[str] = ""
    """The name, below a module's, of a tensor that only files of this packing have; empty where no tool has files."""

    @abstractmethod
    def pack(self, weight: Float[Tensor, "out in"], backend: Backend) -> Packing | None:
        """The matrix in fewer bits, unpacked by `backend`; None leaves it as it is. Raises RecipeError for a shape it
        cannot keep."""

    @abstractmethod
    def packed_bytes(self, shape: tuple[int, int]) -> int | None:
        """Bytes of a matrix of this shape when it is packed; None where it stays as it is."""

    @classmethod
    def reads(cls, config: Mapping[str, object]) -> bool:
        """Whether files with this `quantization_config` are of this method. Raises RecipeError for settings of it that
        it does not have."""
        return False

    @classmethod
    def from_file(cls, held: Mapping[str, Tensor], backend: Backend) -> tuple[Self, Packing]:
        """The packing in the tensors of one module, by names below it, and the method with the knobs it was made with.

        Raises CorruptError for tensors that do not belong together.
        """
        raise NotImplementedError(f"{cls.method_name()} has no files")
