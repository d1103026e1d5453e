"""What other servers will refuse in an adapter, or compute otherwise, told before it is deployed.

A server that refuses an adapter tells so when it is loaded; one that reads a key of its config and ignores another
computes something else and tells nobody. Only the config and the shapes of the tensors are read.
Sources: what was read of each server's code, which changes: vLLM's `lora/peft_helper.py` (0214369), its issues 9280,
    32599 and 33234; SGLang's `srt/lora/lora_config.py` (0ceb81f), whose loader reads no key for what stands beside
    LoRA; llama.cpp's `convert_lora_to_gguf.py` (0b03ada) and `llama-adapter.cpp`, which skips norms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

from luthier.core.errors import CorruptError, GateError, RecipeError
from luthier.core.nearest import did_you_mean
from luthier.data.strict_json import excerpt
from luthier.model.files.adapter_config import CONFIG, TENSORS, read_config
from luthier.model.files.tensor_headers import tensor_shapes
from luthier.store.runs import ADAPTER, RunDirectory, is_run

Kind = Literal["refuses", "otherwise"]
MERGE: Final = "merge it into the base, and serve that"
SERVERS: Final = ("vllm", "sglang", "llama.cpp")
VLLM_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be: `MaxLoRARanks` of its `config/lora.py`."""
_MOST: Final = 1e9
"""No rank and no alpha is as large; what is has no place in a sum."""


@final
@dataclass(frozen=True)
class Finding:
    """A server `refuses` an adapter, or computes it `otherwise` where it does not refuse it: what it is about, and what
    can be done."""

    server: str
    kind: Kind
    what: str
    do: str


def lint(name: str, servers: tuple[str, ...] = SERVERS, *, max_rank: int = 16) -> list[Finding]:
    """What is found in the adapter of a run, or in a folder; `max_rank` is what vLLM is started with.

    Raises RecipeError for a folder without an adapter, for unknown servers, and for what vLLM cannot be started with.
    """
    for server in servers:
        if server not in SERVERS:
            raise RecipeError(
                f"there are no rules for a server {server!r}",
                allowed=", ".join(SERVERS),
                do=did_you_mean(server, SERVERS),
            )
    if "vllm" in servers:
        require_rank(max_rank)
    folder = RunDirectory.open(Path(name)).folder / ADAPTER if is_run(Path(name)) else Path(name)
    if missing := [file for file in (CONFIG, TENSORS) if not (folder / file).is_file()]:
        raise RecipeError(f"{folder} holds no {missing[0]}", do="name a run with an adapter, or its adapter folder")
    adapter = _sound(_Adapter(read_config(folder), tensor_shapes(folder / TENSORS)), folder)
    return [finding for server in servers for finding in _findings(adapter, server, max_rank)]


def require_rank(max_rank: int) -> None:
    """Raise RecipeError for a --max-lora-rank that vLLM does not start with."""
    if max_rank not in VLLM_RANKS:
        above = next((rank for rank in VLLM_RANKS if rank >= max_rank), VLLM_RANKS[-1])
        raise RecipeError(
            f"a --max-lora-rank of {max_rank}, with which vLLM does not start",
            allowed=", ".join(map(str, VLLM_RANKS)), do=f"start it with {above}, and say so here",
        )  # fmt: skip


def require_clean(folder: Path, engine: str, *, max_rank: int) -> None:
    """Raise GateError for an adapter that an engine refuses, or computes otherwise; our own server takes all."""
    if engine not in SERVERS:
        return
    if found := lint(str(folder), (engine,), max_rank=max_rank):
        raise GateError("; ".join(f"{engine} {each.kind} {each.what}" for each in found),
                        do=found[0].do, where=str(folder))  # fmt: skip


@dataclass(frozen=True)
class _Adapter:
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def kind(self) -> str:
        return str(self.config.get("peft_type", "")).upper()

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module, by its name."""
        return {
            name.removeprefix("base_model.model.").partition(".lora_")[0]: shape[0]
            for name, shape in self.shapes.items()
            if ".lora_A" in name or ".lora_embedding_A" in name
        }

    def scale(self, module: str) -> float:
        """What PEFT multiplies the product of a module's factors by."""
        rank = _of_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 1))
        alpha = _of_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 1))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def named(self, *parts: str) -> list[str]:
        """Tensors whose names hold one of these."""
        return sorted(name for name in self.shapes if any(part in name for part in parts))

    def low_rank_at(self, *modules: str) -> list[str]:
        """Low-rank factors of these modules."""
        return [name for name in self.named(*modules) if ".lora_" in name]


def _sound(adapter: _Adapter, folder: Path) -> _Adapter:
    """The adapter, if scales can be made of what it says. Raises CorruptError where they cannot."""
    if adapter.kind != "LORA":
        return adapter
    config = adapter.config
    said = [(key, config[key], key == "r") for key in ("r", "lora_alpha") if key in config]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise _unsound(folder, f"{key} is {excerpt(str(patterns))}", "numbers by the names of modules")
        for pattern, value in patterns.items():
            try:
                re.compile(pattern)
            except re.error:
                raise _unsound(folder, f"{key} names {excerpt(pattern)}", "names, or patterns of names") from None
            said.append((f"{key}.{pattern}", value, key == "rank_pattern"))
    for key, value, whole in said:
        if not _is_number(value, whole=whole):
            raise _unsound(folder, f"{key} is {excerpt(str(value))}", "a whole number above 0" if whole else "a number")
    for name, shape in adapter.shapes.items():
        if ".lora_" in name and not math.prod(shape) * len(shape):
            raise _unsound(folder, f"{excerpt(name)} has the shape {list(shape)}", "factors that hold numbers")
    return adapter


def _is_number(value: object, *, whole: bool) -> bool:
    """Whether it is a finite number that ranks or scales can be; a rank is `whole`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return (isinstance(value, int) and 1 <= value < _MOST) if whole else -_MOST < value < _MOST


def _unsound(folder: Path, what: str, allowed: str) -> CorruptError:
    return CorruptError(what, allowed=allowed, do="save or fetch the adapter again", where=str(folder / CONFIG))


def _findings(adapter: _Adapter, server: str, max_rank: int) -> list[Finding]:
    if adapter.kind != "LORA":
        do = "serve it with luthier serve, or merge it into the base where it can be merged"
        what = f"an adapter of type {adapter.kind or 'unknown'}: LoRA is all it serves"
        return [Finding(server, "refuses", what, do)]
    found = [Finding(server, kind, what, MERGE) for kind, what in _beside(adapter, server)]
    found += [Finding(server, "refuses", what, do) for what, do in _refused(adapter, server, max_rank)]
    return found + [Finding(server, "otherwise", what, do) for what, do in _otherwise(adapter, server)]


def _beside(adapter: _Adapter, server: str) -> list[tuple[Kind, str]]:
    """What an adapter has beside low-rank terms, and what becomes of it."""
    config = adapter.config
    kind: Kind = "otherwise" if server == "sglang" else "refuses"
    found: list[tuple[Kind, str]] = []
    if config.get("use_dora") or adapter.named("lora_magnitude_vector"):
        found.append((kind, "DoRA: a magnitude for each output"))
    if whole := _listed(config.get("modules_to_save")) or adapter.named("modules_to_save"):
        norms = server == "llama.cpp" and all("norm" in name for name in adapter.shapes if ".lora_" not in name)
        what = f"whole modules beside LoRA: {', '.join(map(str, whole))[:120]}"
        found.append(("otherwise" if norms else kind, what))
    if (config.get("bias") or "none") != "none":
        found.append((kind, f"trained biases (bias is {config['bias']!r})"))
    if config.get("trainable_token_indices"):
        # Some versions of vLLM read them.
        found.append(("otherwise" if server == "vllm" else kind, "trained rows of the embedding"))
    return found


def _refused(adapter: _Adapter, server: str, max_rank: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if server == "vllm" and (ends := adapter.low_rank_at("lm_head", "embed_tokens")):
        found.append((f"LoRA on the embedding or the head: {ends[0]}", MERGE))
    if server == "llama.cpp" and (heads := adapter.low_rank_at("lm_head")):
        found.append((f"LoRA on a head that is the embedding too: {heads[0]}", f"{MERGE}; it takes a head of its own"))
    most = max(adapter.ranks.values(), default=0)
    if server == "vllm" and most > max_rank:
        least = next((rank for rank in VLLM_RANKS if rank >= most), None)
        do = f"start it with --max-lora-rank {least}" if least else MERGE
        found.append((f"rank {most}, above --max-lora-rank {max_rank}", do))
    return found


def _otherwise(adapter: _Adapter, server: str) -> list[tuple[str, str]]:
    """Modules whose scale the server takes for another one."""
    config = adapter.config
    wrong = []
    for module, rank in adapter.ranks.items():
        alpha, common = float(config.get("lora_alpha", 1)), int(config.get("r", 1))
        if server == "llama.cpp":
            theirs = alpha / rank
        else:
            root = server == "vllm" and config.get("use_rslora")
            theirs = alpha / (math.sqrt(common) if root else common)
        if not math.isclose(theirs, adapter.scale(module), rel_tol=1e-6):
            wrong.append((module, theirs, adapter.scale(module)))
    if not wrong:
        return []
    module, theirs, ours = wrong[0]
    what = f"{len(wrong)} of {len(adapter.ranks)} modules at another scale: {module} at {theirs:g}, trained at {ours:g}"
    return [(what, "train with one rank and alpha and without rank-stabilised scaling, or merge it into the base")]


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: float) -> float:
    """The value of the first pattern that a module's name ends with, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)


def _listed(names: object) -> list[str]:
    """Names of modules as a config has them: none, one, or a list."""
    return [names] if isinstance(names, str) and names else list(map(str, names)) if isinstance(names, list) else []
