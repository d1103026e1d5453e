"""How engines are asked over HTTP: vLLM, luthier's own server, SGLang and llama.cpp, each in its own words.

What is asked of all: which models there are, to take an adapter, to go on with tokens, and how likely given tokens
are; tokens go and come as ids, so no tokenizer is between. What is believed of an answer stands in told.py.
Sources: vLLM `entrypoints/openai/completion/protocol.py` (002032e) and `entrypoints/serve/lora`; SGLang
    `srt/entrypoints/http_server.py` and `srt/managers/io_struct.py`; llama.cpp `tools/server/README.md` (25d5b0c).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Final, final

from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean
from luthier.data.forest import Ints
from luthier.infer.told import Told
from luthier.infer.wire import Answer, RemoteError, Wire
from luthier.model.speaker import Likely, Sampling, Spoken

BASE: Final = ""
"""The name of the model without any adapter."""


class Dialect(ABC):
    """An engine that is asked over a wire. Names of models are its own; `""` is the base."""

    name: ClassVar[str]
    scores: ClassVar[bool] = True
    """Whether it tells how likely given tokens are; one that does not tells it of its own only."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    @abstractmethod
    def models(self) -> dict[str, str | None]:
        """The names it serves, each with the base it is an adapter of."""

    def context(self) -> int | None:
        """How many tokens a prompt and its answer may have together, where it tells that."""
        return None

    @abstractmethod
    def load(self, name: str, path: str) -> None:
        """Take the adapter at `path` of the engine's machine. Raises RemoteError with what to start the engine with."""

    @abstractmethod
    def unload(self, name: str) -> None:
        """Let a name stand for nothing."""

    @abstractmethod
    def speak(self, prompt: Ints, sampling: Sampling, model: str) -> Spoken:
        """Go on with a prompt."""

    def score(self, tokens: Ints, model: str) -> list[float]:
        """The log-probability of each token but the first."""
        raise RecipeError(f"{len(tokens)} tokens were to be scored, and {self.name} scores its own only",
                          do="let it speak instead")  # fmt: skip

    def use(self, model: str) -> dict[str, Any]:
        """What a client of the API puts into its requests to get this model."""
        return {"model": model}

    def asked(self, path: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """What it answers, which has to be an object."""
        return self.whole(self.wire.post(path, values), path)

    def whole(self, answer: Answer, path: str) -> Mapping[str, Any]:
        """The object in an answer."""
        if answer.status == 401:
            raise RemoteError(
                f"{self.wire.shown} {'takes another token' if self.wire.token else 'asks for a token'} "
                f"(status {answer.status})", do="put it into LUTHIER_ENGINE_TOKEN",
            )  # fmt: skip
        if not answer.fine:
            raise RemoteError(f"{self.wire.shown}{path} answered {answer.status}: {answer.words}")
        if not isinstance(answer.body, Mapping):
            raise self.strange(path, answer.body)
        return answer.body

    def strange(self, path: str, what: object) -> RemoteError:
        """The error for an answer that is none."""
        return RemoteError(
            f"{self.wire.shown}{path} answered {what!r:.160}", allowed=f"what {self.name} answers there",
            do="look whether that is what runs there (--engine, or rollouts.engine.dialect)",
        )  # fmt: skip


class _OpenAI(Dialect):
    """What vLLM and SGLang have in common; adapters come and go below `place`."""

    place: ClassVar[str] = ""

    def models(self) -> dict[str, str | None]:
        """The names in GET /v1/models."""
        return {str(each["id"]): each.get("parent") for each in self._cards()}

    def context(self) -> int | None:
        """The least `max_model_len` in GET /v1/models."""
        told = [each.get("max_model_len") for each in self._cards()]
        return min((each for each in told if isinstance(each, int) and each > 0), default=None)

    def _cards(self) -> list[Mapping[str, Any]]:
        path = "/v1/models"
        answer = self.wire.get(path)
        if answer.status == 404:
            raise self.strange(path, answer.words)
        found = self.whole(answer, path).get("data")
        if not isinstance(found, list) or not all(isinstance(each, Mapping) and "id" in each for each in found):
            raise self.strange(path, found)
        return found

    def unload(self, name: str) -> None:
        """POST /v1/unload_lora_adapter, or the same without /v1."""
        answer = self.wire.post(f"{self.place}/unload_lora_adapter", {"lora_name": name})
        if not answer.fine:
            raise RemoteError(f"{self.wire.shown} did not unload {name!r:.80} ({answer.status}): {answer.words}")


class _Completions(_OpenAI):
    """vLLM, and what speaks as it does. `start` is how one is started that takes adapters, `limits` what it refuses."""

    place = "/v1"
    start: ClassVar[str]
    limits: ClassVar[str]

    def load(self, name: str, path: str) -> None:
        """POST /v1/load_lora_adapter."""
        answer = self.wire.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if answer.status in (404, 405):
            raise RemoteError(
                f"{self.wire.shown} takes no adapters while it runs (status {answer.status})",
                do=self.start.format(name=name, path=path),
            )
        if not answer.fine:
            self._refused(name, path, answer)

    def score(self, tokens: Ints, model: str) -> list[float]:
        """What echo tells of the tokens of a prompt."""
        path = "/v1/completions"
        body = {"model": model or self._base(), "prompt": tokens.tolist(), "max_tokens": 0, "echo": True, "logprobs": 0,
                "temperature": 0.0, "return_tokens_as_token_ids": True, "return_token_ids": True}  # fmt: skip
        return self._choice(path, body).scores(self.wire.shown, tokens)

    def speak(self, prompt: Ints, sampling: Sampling, model: str) -> Spoken:
        """POST /v1/completions with token ids."""
        body = {"model": model or self._base(), "prompt": prompt.tolist(), "max_tokens": sampling.max_new_tokens,
                "min_tokens": sampling.min_new_tokens, "seed": sampling.seed, "logprobs": sampling.likeliest,
                "ignore_eos": True, "stop_token_ids": list(sampling.stop_ids), "return_tokens_as_token_ids": True,
                "return_token_ids": True, **self._told_at(sampling), **_knobs(sampling),
                **_biases(sampling)}  # fmt: skip
        return self._choice("/v1/completions", body).spoken(self.wire.shown, sampling)

    def _told_at(self, _sampling: Sampling) -> dict[str, Any]:
        """How a request says at what temperature log-probabilities are told; vLLM is told so when it starts."""
        return {}

    def _base(self) -> str:
        """The name of the base: the one that is no adapter."""
        bases = [name for name, parent in self.models().items() if parent is None]
        if not bases:
            raise self.strange("/v1/models", "no base")
        return bases[0]

    def _choice(self, path: str, body: Mapping[str, Any]) -> Told:
        found = self.asked(path, body)
        try:
            choice = found["choices"][0]
            told = choice["logprobs"]
            tokens = [_id(each) for each in told["tokens"]]
            tops = [_likely(each) for each in told.get("top_logprobs") or []]
            return Told(tokens, list(told["token_logprobs"]), str(choice["finish_reason"]), tops)
        except (KeyError, IndexError, TypeError, ValueError):
            raise self.strange(path, found.get("choices")) from None

    def _refused(self, name: str, path: str, answer: Answer) -> None:
        if answer.status == 401:
            self.whole(answer, "/v1/load_lora_adapter")
        raise RemoteError(
            f"{self.wire.shown} did not take {name!r:.80} from {path!r:.120} ({answer.status}): {answer.words}",
            do=f"a path is one on the engine's machine (--path); {self.limits}",
        )


@final
class VLLM(_Completions):
    """vLLM."""

    name = "vllm"
    start = ("start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora, or give it the "
             "adapter at its start: --lora-modules {name}={path}")  # fmt: skip
    limits = "a rank above its limit needs --max-lora-rank"


@final
class Luthier(_Completions):
    """Luthier's own server, which serves adapters of every kind."""

    name = "luthier"
    start = "start it with luthier serve BASE --adapters DIR"
    limits = "it has to lie below the folder of --adapters"

    def _told_at(self, sampling: Sampling) -> dict[str, Any]:
        return {} if sampling.told_at == 1 else {"logprobs_mode": "processed_logprobs"}


@final
class SGLang(_OpenAI):
    """SGLang. What it says is told after temperature, and a seed is not heard unless it runs deterministically."""

    name = "sglang"

    def load(self, name: str, path: str) -> None:
        """POST /load_lora_adapter."""
        answer = self.wire.post("/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if answer.fine and isinstance(answer.body, Mapping) and answer.body.get("success", True):
            return
        if answer.status == 404:
            raise self.strange("/load_lora_adapter", answer.words)
        if answer.status == 401:
            self.whole(answer, "/load_lora_adapter")
        raise RemoteError(
            f"{self.wire.shown} did not take {name!r:.80} from {path!r:.120} ({answer.status}): {answer.words}",
            do="start it with --enable-lora --max-lora-rank RANK --lora-target-modules all; a path is one on the "
            "engine's machine (--path)",
        )

    def score(self, tokens: Ints, model: str) -> list[float]:
        """What /generate tells of its input."""
        body = {"input_ids": tokens.tolist(), "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
                "return_logprob": True, "logprob_start_len": 0, **self._adapter(model)}  # fmt: skip
        return self._told(self._meta(body), "input").scores(self.wire.shown, tokens)

    def speak(self, prompt: Ints, sampling: Sampling, model: str) -> Spoken:
        """POST /generate with token ids."""
        if sampling.temperature not in (0.0, sampling.told_at):
            raise RecipeError(f"temperature is {sampling.temperature}, and SGLang tells log-probabilities after it",
                              allowed=f"0 or {sampling.told_at:g}")  # fmt: skip
        knobs = {"max_new_tokens": sampling.max_new_tokens, "min_new_tokens": sampling.min_new_tokens,
                 "stop_token_ids": list(sampling.stop_ids), "ignore_eos": not sampling.stop_ids,
                 **_knobs(sampling), **_biases(sampling)}  # fmt: skip
        body = {"input_ids": prompt.tolist(), "sampling_params": knobs, "return_logprob": True,
                "top_logprobs_num": sampling.likeliest, **self._adapter(model)}  # fmt: skip
        return self._told(self._meta(body), "output").spoken(self.wire.shown, sampling)

    def _adapter(self, model: str) -> dict[str, str]:
        return {"lora_path": model} if model else {}

    def _meta(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        meta = self.asked("/generate", body).get("meta_info")
        if not isinstance(meta, Mapping):
            raise self.strange("/generate", meta)
        return meta

    def _told(self, meta: Mapping[str, Any], which: str) -> Told:
        try:
            pairs = list(meta[f"{which}_token_logprobs"])
            reason = meta.get("finish_reason")
            ended = str(reason.get("type")) if isinstance(reason, Mapping) else str(reason)
            tops = [
                tuple((int(one[1]), float(one[0])) for one in each or ())
                for each in meta.get(f"{which}_top_logprobs") or ()
            ]
            return Told([int(each[1]) for each in pairs], [each[0] for each in pairs], ended, tops)
        except (TypeError, ValueError, IndexError, KeyError):
            raise self.strange("/generate", meta) from None


@final
class LlamaCpp(Dialect):
    """llama.cpp's server. Its adapters come with it (`--lora FILE.gguf`), and it tells log-probabilities of what it
    says itself only. Their names are those of their files."""

    name = "llama.cpp"
    scores = False

    def models(self) -> dict[str, str | None]:
        """The base, and the adapters it was started with."""
        return {BASE: None, **dict.fromkeys(self._ids(), BASE)}

    def load(self, name: str, path: str) -> None:
        """It has the adapter, or it was not started with it."""
        ids = self._ids()
        if name not in ids:
            raise RemoteError(
                f"{self.wire.shown} was started with {', '.join(ids) or 'no adapter'}, and not with {name!r:.80}",
                do=f"python convert_lora_to_gguf.py {path} --outfile {name}.gguf, then "
                f"llama-server -m BASE.gguf --lora {name}.gguf --lora-init-without-apply",
            )

    def unload(self, name: str) -> None:
        """It keeps what it was started with."""
        raise RemoteError(f"llama.cpp cannot let go of {name!r:.80} while it runs", do="start it anew")

    def speak(self, prompt: Ints, sampling: Sampling, model: str) -> Spoken:
        """POST /completion with token ids; it ends at the model's own end-of-text tokens too."""
        if sampling.min_new_tokens:
            raise RecipeError(f"min_new_tokens is {sampling.min_new_tokens}", allowed="0 with llama.cpp")
        knobs = _knobs(sampling)
        knobs["repeat_penalty"] = knobs.pop("repetition_penalty")
        body = {"prompt": prompt.tolist(), "n_predict": sampling.max_new_tokens, "seed": sampling.seed,
                "n_probs": max(1, sampling.likeliest), "post_sampling_probs": False, "return_tokens": True,
                "cache_prompt": False, "repeat_last_n": -1, "logit_bias": [list(each) for each in sampling.logit_bias],
                **knobs, **self.use(model)}  # fmt: skip
        found = self.asked("/completion", body)
        try:
            told = found["completion_probabilities"]
            tops = [tuple((int(one["id"]), float(one["logprob"])) for one in each["top_logprobs"]) for each in told]
            said = Told([int(each["id"]) for each in told], [each["logprob"] for each in told],
                        "length" if found["stop_type"] == "limit" else "stop", tops)  # fmt: skip
        except (KeyError, TypeError, ValueError):
            raise self.strange("/completion", found) from None
        return said.spoken(self.wire.shown, sampling)

    def use(self, model: str) -> dict[str, Any]:
        """Weights of its adapters: all off but one."""
        ids = self._ids()
        if model and model not in ids:
            raise RemoteError(f"{self.wire.shown} has no adapter {model!r:.80}", do=did_you_mean(model, list(ids)))
        return {"lora": [{"id": number, "scale": float(name == model)} for name, number in ids.items()]}

    def _ids(self) -> dict[str, int]:
        path = "/lora-adapters"
        answer = self.wire.get(path)
        if answer.status == 404:
            raise self.strange(path, answer.words)
        if not answer.fine or not isinstance(answer.body, list):
            self.whole(answer, path)
            raise self.strange(path, answer.body)
        try:
            return {_stem(str(each["path"])): int(each["id"]) for each in answer.body}
        except (KeyError, TypeError, ValueError):
            raise self.strange(path, answer.body) from None


DIALECTS: Final[Mapping[str, type[Dialect]]] = {each.name: each for each in (VLLM, Luthier, SGLang, LlamaCpp)}


def dialect_named(name: str, wire: Wire) -> Dialect:
    """The engine at the other end of a wire, by what kind it is. Raises RecipeError for kinds that are not known."""
    if name not in DIALECTS:
        raise RecipeError(f"there is no engine {name!r:.80}", allowed=", ".join(DIALECTS),
                          do=did_you_mean(name, list(DIALECTS)))  # fmt: skip
    return DIALECTS[name](wire)


def _knobs(sampling: Sampling) -> dict[str, Any]:
    """How tokens are chosen, in words common to all three. Neutral ones are said too: an engine fills in what is left
    out, with what it finds beside its model."""
    found: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    return found | ({"stop": list(sampling.stop)} if sampling.stop else {})


def _biases(sampling: Sampling) -> dict[str, Any]:
    biases = {str(token): bias for token, bias in sampling.logit_bias}
    return {"logit_bias": biases} if biases else {}


def _id(token: object) -> int:
    """The number in `token_id:42`."""
    return int(str(token).removeprefix("token_id:"))


def _likely(pairs: Mapping[str, Any] | None) -> Likely:
    return tuple((_id(token), float(log_prob)) for token, log_prob in (pairs or {}).items())


def _stem(path: str) -> str:
    """The name of a file without its folder and its ending."""
    return path.replace("\\", "/").rpartition("/")[2].removesuffix(".gguf")
