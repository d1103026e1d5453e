"""Mutations of JSON files and safetensors headers that know the format, and what the format is by its specification."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any, Final

from tests.faults.mutators import mutate

_ODD: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308, -0.0, "", "x", "NaN", "F32", "auto",
    "../../etc/passwd", "\0", "\ud800", "x" * 5000, [], {}, [[]], [None], {"": None}, [0] * 300,
    {"a": {"b": {"c": []}}},
)  # fmt: skip


def mutate_json(good: bytes, dice: random.Random) -> bytes:
    """JSON with another value, key or type somewhere, or with its bytes mutated."""
    if dice.random() < 0.4:
        return mutate(good, dice)
    value = json.loads(good)
    for _ in range(dice.choice((1, 1, 2, 3))):
        value = _changed(value, dice)
    text = json.dumps(value, indent=dice.choice((None, 1)), allow_nan=True)
    # What Python's own writer would not write: values nested too deep, whole numbers too long, numbers too large.
    text = text.replace('"x"', dice.choice(('"x"', "[" * 5000 + "]" * 5000, "7" * 5000, "1e999", "-1e999", "1.0e-999")))
    if dice.random() < 0.15:
        text = _doubled_key(text, dice)
    return text.encode("utf-8", "surrogatepass")


def _changed(value: Any, dice: random.Random) -> Any:
    """`value` with one thing in it replaced, removed, added or renamed."""
    if dice.random() < 0.12 or not isinstance(value, (dict, list)) or not value:
        return dice.choice(_ODD) if dice.random() < 0.9 else float(dice.choice(("nan", "inf", "-inf")))
    key = dice.choice(list(value)) if isinstance(value, dict) else dice.randrange(len(value))
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    what = dice.random()
    if what < 0.6:
        copy[key] = _changed(copy[key], dice)
    elif what < 0.75:
        del copy[key]
    elif isinstance(copy, dict):
        copy[dice.choice((f"{key}x", "", "__proto__", "auto_map", "self", "\ud800", "a" * 300))] = dice.choice(_ODD)
        if what > 0.9:
            copy[f"{key} "] = copy.pop(key)
    else:
        copy.insert(key, copy[key] if what < 0.85 else dice.choice(_ODD))
    return copy


def _doubled_key(text: str, dice: random.Random) -> str:
    place = text.find('"', dice.randrange(len(text)))
    end = text.find('"', place + 1)
    return text if place < 0 or end < 0 else f"{text[:place]}{text[place : end + 1]}:0,{text[place:]}"


def mutate_header(good: bytes, dice: random.Random) -> bytes:
    """A safetensors file with another header, another length of it, other data, or its bytes mutated."""
    size = struct.unpack("<Q", good[:8])[0]
    header, data = good[8 : 8 + size], good[8 + size :]
    what = dice.random()
    if what < 0.25:
        return mutate(good, dice)
    if what < 0.35:
        near = (0, 1, size - 1, size + 1, size + 8, len(good))
        return struct.pack("<Q", dice.choice((*near, 2**31, 2**32, 2**63, 2**64 - 1, 100 * 2**20 + 1))) + good[8:]
    if what < 0.45:
        place = dice.randrange(max(len(data), 1))
        changed = dice.choice((data[:place], data + b"\0" * dice.choice((1, 8, 4096)), b"", _flipped(data, dice)))
        return good[: 8 + size] + changed
    if what < 0.55:
        new = mutate(header, dice)
        return struct.pack("<Q", len(new)) + new + data
    value = json.loads(header)
    for _ in range(dice.choice((1, 1, 2))):
        value = _other_tensor(value, dice) if dice.random() < 0.7 else _changed(value, dice)
    new = json.dumps(value, allow_nan=True).encode("utf-8", "surrogatepass") + b" " * dice.choice((0, 0, 1, 7))
    if dice.random() < 0.1:
        new = _doubled_key(new.decode("utf-8", "surrogatepass"), dice).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(new)) + new + data


_TYPES: Final = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", "O")
_SHAPES: Final[tuple[Callable[[list[Any]], list[Any]], ...]] = (
    lambda shape: shape[::-1],
    lambda shape: [*shape, 1],
    lambda shape: shape[:-1],
    lambda shape: [2**62, 4],
    lambda shape: [-1, *shape],
    lambda shape: [2**64 - 1, 2],
    lambda shape: [0],
    lambda shape: [*shape, 0],
    lambda shape: [1.0, *shape],
)
_SHIFTS: Final = (-8, -1, 1, 4, 8, 2**40, 2**63, 2**64 - 1)


def _other_tensor(header: Any, dice: random.Random) -> Any:
    """The header with another type, shape, or place of one of its tensors."""
    if not isinstance(header, dict):
        return header
    names = [name for name, about in header.items() if isinstance(about, dict) and "shape" in about]
    if not names:
        return header
    about = dict(header[name := dice.choice(names)])
    part = dice.choice(("dtype", "shape", "data_offsets", "data_offsets"))
    if part == "dtype":
        about["dtype"] = dice.choice(_TYPES)
    elif part == "shape":
        about["shape"] = dice.choice(_SHAPES)(about["shape"] if isinstance(about["shape"], list) else [])
    else:
        place = about.get("data_offsets")
        start, stop = place if isinstance(place, list) and len(place) == 2 else (0, 0)
        further, shifted = _plus(stop, dice.choice(_SHIFTS)), _plus(start, dice.choice(_SHIFTS))
        places = ([start, stop], [stop, start], [start, further], [shifted, further], [0, 0], [start])
        about["data_offsets"] = dice.choice(places)
    return {**header, name: about}


def _plus(number: Any, shift: int) -> Any:
    return number + shift if isinstance(number, int) else shift


def _flipped(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    if changed:
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def wrong_tensors(data: bytes) -> str:
    """What the specification of safetensors says against these bytes; empty when they are a tensor file.

    Source: safetensors' README, "Format": 8 bytes of length (at most 100 MB), a JSON object that begins with `{`, no
    duplicate keys, offsets without holes or overlaps, the whole buffer in use.
    """
    if len(data) < 8:
        return "shorter than its length field"
    size = struct.unpack("<Q", data[:8])[0]
    if size > 100 * 10**6 or size > len(data) - 8:
        return f"a header of {size:,} bytes"
    try:
        header = json.loads(data[8 : 8 + size].decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as failure:
        return f"the header is no JSON: {failure}"
    if not isinstance(header, dict) or data[8:9] != b"{":
        return "the header is no object"
    about = header.pop("__metadata__", {})
    if about is not None and not (isinstance(about, dict) and all(isinstance(text, str) for text in about.values())):
        return "metadata that is no text"
    at = 0
    try:
        for part in sorted(header.values(), key=lambda each: tuple(each["data_offsets"])):
            start, stop = part["data_offsets"]
            bits = _BITS[part["dtype"]]
            for length in part["shape"]:
                if type(length) is not int or length < 0:
                    return f"a length of {length!r}"
                bits *= length
            if type(start) is not int or type(stop) is not int or start != at or bits != 8 * (stop - start):
                return f"{part} does not begin at {at}, or is not of its size"
            at = stop
    except (ValueError, TypeError, LookupError, AttributeError) as failure:
        return f"an entry that is none: {failure!r}"
    return "" if at == len(data) - 8 - size else f"{len(data) - 8 - size - at} bytes that belong to nothing"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key for the second time")
    return dict(pairs)
