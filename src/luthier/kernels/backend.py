"""What each kind of device does in its own way: the work between the matrix products of a block, and attention.

Idea: autograd functions are written once (blocks.py, causal.py, head.py). What lies between the products is a handful
of operations over rows, each of which a device may do in one pass over memory; the products are the library's where
nothing is faster. This is their contract. `torch_backend.py` is the twin in plain torch, which runs everywhere, in
float64 too, and which all others are tested against; `native_backend.py` is C++ for CPUs, `triton_backend.py` is for
GPUs, and `chosen.py` takes the best.
Every tensor is contiguous in its last dimension; float64 is only promised by the twin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Float, Int, Int8, Int32, UInt8
from torch import Tensor

from luthier.kernels.many import Summand, by_library
from luthier.kernels.thin import ThinRows, ThinTerms

SPEAKS: Final = 8
"""New tokens of a text that are taken one by one, as those are that it says (native/pages.cpp)."""

Run = tuple[int, int]
"""How many texts follow each other, and the length of each of them."""


@final
@dataclass(frozen=True)
class Seen:
    """What texts see before their own tokens: keys of texts they descend from, or from outside.

    `ranges` has, for each text, first rows and counts of rows among all keys, `outside` of which lie before those of
    the first text. Where texts see nothing, and how many they are only the device knows, `starts` are their first rows,
    and behind them the number of all, once or more.
    """

    ranges: tuple[tuple[tuple[int, int], ...], ...]
    outside: int = 0
    starts: Int32[Tensor, " starts"] | None = None


@final
@dataclass(frozen=True)
class Paged:
    """Texts whose keys and values lie in pages, and the new tokens of each, which are its last ones.

    Page p is rows `p * size` to `(p + 1) * size` of the keys; `pages` has the pages of each text in their order, and
    anything behind them. `counts` says how many keys a text has, its new tokens included; those of text i are the rows
    `starts[i]` to `starts[i + 1]` of the queries. `one_each` holds where no text has more than one.
    """

    pages: Int[Tensor, "texts most"]
    counts: Int[Tensor, " texts"]
    starts: Int[Tensor, " texts+1"]
    size: int
    one_each: bool


@final
@dataclass(frozen=True)
class BlockScales:
    """The scale of each block of numbers: `numbers`, or where there are `codes`, `levels` of these times the number of
    each `group` of them, plus `mean`."""

    numbers: Float[Tensor, " groups"]
    codes: UInt8[Tensor, " blocks"] | None = None
    levels: Float[Tensor, 256] | None = None
    mean: Float[Tensor, ""] | None = None
    group: int = 1

    def each(self) -> Float[Tensor, " blocks"]:
        """The scale of each block."""
        if self.codes is None or self.levels is None or self.mean is None:
            return self.numbers
        own = self.numbers.repeat_interleave(self.group)[: len(self.codes)]
        return self.levels.index_select(0, self.codes.int()) * own + self.mean


@final
@dataclass(frozen=True)
class RowCodes:
    """A weight as whole numbers of -127 to 127 and a scale for each row of them."""

    codes: Int8[Tensor, "out in"]
    scales: Float[Tensor, " out"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of."""
        return self.codes, self.scales


@final
@dataclass(frozen=True)
class PairCodes:
    """A weight (out, in) of sixteen `levels`: their numbers in pairs, the first in the high half of a byte, and a scale
    for each `block` of numbers. Blocks run through the rows from one into the next."""

    codes: UInt8[Tensor, " pairs"]
    scales: BlockScales
    levels: Float[Tensor, 16]
    block: int
    shape: tuple[int, int]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of, but for the levels, which all have in common."""
        own = (self.codes, self.scales.numbers, self.scales.codes, self.scales.levels, self.scales.mean)
        return tuple(each for each in own if each is not None)


Codes = RowCodes | PairCodes
"""A weight that the kernels multiply in fewer bits."""
Bare = tuple[Tensor | Codes, Tensor | None]
"""A linear layer with nothing on it: its weight (out, in) and its bias."""
Norm = tuple[Tensor, float]
"""The weight of a root-mean-square norm, and what it adds to the mean of the squares."""


@final
@dataclass(frozen=True)
class BareBlock:
    """A block of the common shape as it stands: its layers, of queries, keys, values, output, gate, up and down, and
    its norms; `head_norms` are those of each head of queries and of keys, where it has them. `scale` is the factor of
    the logits of its attention, `window` how many keys a token sees at most, itself included."""

    layers: tuple[Bare, Bare, Bare, Bare, Bare, Bare, Bare]
    norms: tuple[Norm, Norm]
    head_norms: tuple[Norm, Norm] | None
    head_size: int
    scale: float
    window: int | None


@final
@dataclass(frozen=True)
class KeptRows:
    """The keys and values of layers that stay. Layer j lies as group `of[j]` has it: those of new token i go to its
    `rows[i]`, and its `texts` say who sees what. Their starts are those of all groups."""

    keys: Sequence[Float[Tensor, "kept groups size"]]
    values: Sequence[Float[Tensor, "kept groups size"]]
    of: Sequence[int]
    rows: Sequence[Int[Tensor, " n"]]
    texts: Sequence[Paged]


@final
@dataclass(frozen=True)
class AddedTerms:
    """What is added to the outputs of the seven layers of each block, in the `rows` that say so."""

    terms: tuple[tuple[ThinTerms | None, ...], ...]
    rows: ThinRows


class TokenBlocks(ABC):
    """Blocks that follow each other, for passes of a few tokens over kept keys, without a graph.

    They give what the operations of their backend give one by one, bit for bit; terms are added as `thin` adds them.
    """

    @property
    @abstractmethod
    def most(self) -> int:
        """How many rows they are for at most."""

    @abstractmethod
    def through(
        self,
        x: Float[Tensor, "n d"],
        which: range,
        angles: tuple[Float[Tensor, "n half"], Float[Tensor, "n half"]],
        kept: KeptRows,
        added: AddedTerms | None,
    ) -> Float[Tensor, "n d"] | None:
        """The blocks `which` of them in turn; `kept` and `added` are those of these blocks. None, with nothing written,
        where these numbers, or so many rows, are not for them."""


class Backend(ABC):
    """The operations, on one kind of device. Numbers are summed in float32 at least, whatever they are kept in."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What LUTHIER_KERNELS calls it."""

    @property
    def identity(self) -> str:
        """Its name and what it was made of: with the same identity the same numbers come out, on the same machine."""
        return self.name

    @abstractmethod
    def norm(
        self, x: Float[Tensor, "n d"], weight: Float[Tensor, " d"], eps: float
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n 1"]]:
        """`weight` x / rms(x), rounded before the weight as the zoo does it; and 1 / rms(x) in float32 or wider."""

    @abstractmethod
    def normed(
        self, x: Float[Tensor, "n d"], weight: Float[Tensor, " d"], inverse: Float[Tensor, "n 1"]
    ) -> Float[Tensor, "n d"]:
        """The first result of `norm` again, bit for bit, from the second."""

    @abstractmethod
    def norm_backward(
        self,
        grad: Float[Tensor, "n d"],
        x: Float[Tensor, "n d"],
        weight: Float[Tensor, " d"],
        inverse: Float[Tensor, "n 1"],
        added: Float[Tensor, "n d"] | None,
    ) -> Float[Tensor, "n d"]:
        """The gradient of the norm's input, plus `added`."""

    @abstractmethod
    def gated(self, gate: Float[Tensor, "n f"], up: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
        """silu(gate) up."""

    @abstractmethod
    def gated_backward(
        self, grad: Float[Tensor, "n f"], gate: Float[Tensor, "n f"], up: Float[Tensor, "n f"]
    ) -> tuple[Float[Tensor, "n f"], Float[Tensor, "n f"]]:
        """The gradients of gate and up; `grad` may be overwritten."""

    @abstractmethod
    def rotated(
        self, x: Float[Tensor, "n heads size"], cosines: Float[Tensor, "n half"], sines: Float[Tensor, "n half"]
    ) -> Float[Tensor, "n heads size"]:
        """Each head's first and second half, turned against each other. Turned back when the sines change sign."""

    @abstractmethod
    def label_slopes(
        self,
        logits: Float[Tensor, "n V"],
        labels: Int[Tensor, " n"],
        *,
        slopes: bool,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"] | None]:
        """log p(label) of each row in float32 or wider, and its slope in the logits, if asked for.

        The slopes are in the precision of the logits, whose memory may be used for them.
        """

    def best(self, logits: Float[Tensor, "n V"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """The place of the greatest logit of each row, and log sum exp of the row in float32 or wider, without a graph.

        Where a logit is not finite, and not minus infinity, the second number is not.
        """
        wide = logits if logits.dtype == torch.float64 else logits.float()
        if not wide.numel():
            return wide.new_empty(len(wide), dtype=torch.int64), wide.new_empty(len(wide))
        most, places = wide.max(-1)
        # By the softmax, which is one pass: the best one's chance is exp(most) / sum.
        return places, most - wide.softmax(-1).amax(-1).log()

    @abstractmethod
    def unpacked(
        self,
        codes: UInt8[Tensor, " pairs"],
        scales: Float[Tensor, " blocks"],
        levels: Float[Tensor, 16],
        block: int,
        numbers: int,
        dtype: torch.dtype,
    ) -> Float[Tensor, " numbers"]:
        """Numbers from codes of four bits, the first of two in the high half of a byte: the level of each, times the
        scale of its block, rounded once to `dtype`."""

    def unpacked_rows(
        self, codes: Int8[Tensor, "out in"], scales: Float[Tensor, " out"], dtype: torch.dtype
    ) -> Float[Tensor, "out in"]:
        """Whole numbers times the scale of their row, rounded once to `dtype`."""
        return torch.mul(codes, scales[:, None]).to(dtype)

    @abstractmethod
    def thin(self, x: Float[Tensor, "n in"], y: Float[Tensor, "n out"], terms: ThinTerms, rows: ThinRows) -> None:
        """Add to the rows of `y` the terms of those of `x`, in the short ranges of `rows`, without a backward pass."""

    @abstractmethod
    def attends(self, query: Float[Tensor, "n heads size"], seen: Seen | None) -> bool:
        """Whether `attend` is there for queries like this one, and for what they see."""

    @abstractmethod
    def attend(
        self,
        query: Float[Tensor, "n heads size"],
        key: Float[Tensor, "m groups size"],
        value: Float[Tensor, "m groups size"],
        runs: Sequence[Run],
        scale: float,
        seen: Seen | None,
    ) -> tuple[Float[Tensor, "n heads size"], tuple[Tensor, ...]]:
        """Causal attention within each of the texts that `runs` lays end to end, after all that it sees.

        Returns with it what the backward pass needs. Without `seen` keys and queries have the same rows.
        """

    @abstractmethod
    def attend_backward(
        self,
        grad: Float[Tensor, "n heads size"],
        query: Float[Tensor, "n heads size"],
        key: Float[Tensor, "m groups size"],
        value: Float[Tensor, "m groups size"],
        out: Float[Tensor, "n heads size"],
        kept: Sequence[Tensor],
        runs: Sequence[Run],
        scale: float,
        seen: Seen | None,
    ) -> tuple[Float[Tensor, "n heads size"], Float[Tensor, "m groups size"], Float[Tensor, "m groups size"]]:
        """The gradients of query, key and value."""

    @abstractmethod
    def attend_pages(
        self,
        query: Float[Tensor, "n heads size"],
        keys: Float[Tensor, "rows groups size"],
        values: Float[Tensor, "rows groups size"],
        texts: Paged,
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "n heads size"]:
        """Causal attention of the new tokens of texts over all keys of each, without a backward pass.

        With a `window` a token sees that many keys at most, itself included. Where there are products of `few` rows,
        up to SPEAKS new tokens of a text are each the same to the bit in any company.
        """

    def token_blocks(self, blocks: Sequence[BareBlock]) -> TokenBlocks | None:
        """Blocks of a model as one call takes them; None where there is no shorter way than the operations here. The
        memory of their weights is kept, and read at each call: who gives them other weights asks anew."""
        return None

    @abstractmethod
    def product(
        self, x: Float[Tensor, "n in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "n out"]:
        """x W^T + b, without a backward pass."""

    def products(
        self, x: Float[Tensor, "n in"], layers: Sequence[tuple[Tensor, Tensor | None]]
    ) -> list[Float[Tensor, "n _"]]:
        """`product` with each of several weights and biases."""
        return [self.product(x, weight, bias) for weight, bias in layers]

    def summed(
        self,
        parts: Sequence[Summand],
        bias: Float[Tensor, " out"] | None = None,
        *,
        out: Float[Tensor, "n out"] | None = None,
    ) -> Float[Tensor, "n out"]:
        """The sum of products of the same rows, and b, into `out` if there is one; without a backward pass."""
        return by_library(parts, bias, out, self.product)

    def crossed(
        self, left: Float[Tensor, "n p"], right: Float[Tensor, "n q"], dtype: torch.dtype
    ) -> Float[Tensor, "p q"]:
        """left^T right, a sum over all rows, in `dtype`; without a backward pass."""
        return (left.t() @ right).to(dtype)

    @property
    @abstractmethod
    def few(self) -> int:
        """Up to how many rows our products are faster here than the library's, or as fast. A row of them is the same to
        the bit in any company, and so is what else is done to so many rows without a backward pass."""

    def multiplies_packed(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether products of so many rows with packed weights are faster here than to unpack them and multiply."""
        return 0 < rows <= self.few

    def multiplies_bytes(self, rows: int, dtype: torch.dtype) -> bool:
        """The same of weights of whole numbers with a scale for each row."""
        return self.multiplies_packed(rows, dtype)

    @abstractmethod
    def product_of_bytes(
        self, x: Float[Tensor, "n in"], codes: Int8[Tensor, "out in"], scales: Float[Tensor, " out"]
    ) -> Float[Tensor, "n out"]:
        """x (s q)^T for whole numbers q of -127 to 127 and a scale for each row of them."""

    @abstractmethod
    def product_of_codes(self, x: Float[Tensor, "n in"], weight: PairCodes) -> Float[Tensor, "n out"]:
        """x W^T for the matrix W that `unpacked` makes of the codes, in the precision of x."""
