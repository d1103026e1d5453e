"""Stand-ins for vLLM, SGLang and llama.cpp: their HTTP dialects, as documented, before our own models.

Faults can be planted: `models` says which of our models computes under which name, so an engine that ignores an adapter
has the base under its name; `opens` says what it computes for an adapter at a path; `script` answers in its place;
`pause` makes it slow; `redirect` sends whoever asks away.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from luthier.infer.request import Request
from luthier.model.speaker import Likely, Sampling
from luthier.recipes.opening.opened import Opened

Answer = tuple[int, Any]
Said = tuple[list[int], list[float], str, list[Likely]]


@dataclass
class Foreign:
    """An engine of a `kind`. What it can load is in `models`; what it has loaded, or was started with, in `loaded`."""

    kind: str
    models: dict[str, Opened]
    loaded: list[str] = field(default_factory=list)
    token: str = ""
    pause: float = 0.0
    redirect: str = ""
    takes_adapters: bool = True
    opens: Callable[[str], Opened] | None = None
    script: Callable[[str, Any], Answer] | None = None
    asked: list[tuple[str, Mapping[str, str], Any]] = field(default_factory=list)
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, path: str, body: Any) -> Answer:
        """What it says to a request."""
        routes: dict[str, Callable[[Any], Answer]] = {
            "/v1/models": self._list, "/v1/load_lora_adapter": self._load, "/v1/unload_lora_adapter": self._unload,
            "/v1/completions": self._completions, "/load_lora_adapter": self._load, "/generate": self._generate,
            "/unload_lora_adapter": self._unload, "/lora-adapters": self._adapters, "/completion": self._completion,
        }  # fmt: skip
        own = {"vllm": ("/v1/",), "sglang": ("/v1/models", "/load", "/unload", "/gen"),
               "llama.cpp": ("/lora", "/compl")}  # fmt: skip
        if not path.startswith(own[self.kind]) or path not in routes:
            return 404, {"detail": "Not Found"}
        with self.lock:
            return routes[path](body)

    def _list(self, _body: Any) -> Answer:
        cards = [{"id": "base", "parent": None}, *({"id": name, "parent": "base"} for name in self.loaded)]
        return 200, {"object": "list", "data": cards}

    def _load(self, body: Any) -> Answer:
        if not self.takes_adapters:
            return (404, {"detail": "Not Found"}) if self.kind == "vllm" else (400, {"success": False, "error_message":
                                                                               "LoRA is not enabled."})  # fmt: skip
        name = body["lora_name"]
        if name in self.loaded:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        if self.opens is not None:
            self.models[name] = self.opens(body["lora_path"])
        self.loaded.append(name)
        return (200, "Success") if self.kind == "vllm" else (200, {"success": True, "loaded_adapters": {}})

    def _unload(self, body: Any) -> Answer:
        self.loaded.remove(body["lora_name"])
        return 200, "Success" if self.kind == "vllm" else {"success": True}

    def _model(self, name: str) -> Opened | None:
        if name in ("", "base"):
            return self.models[""]
        return self.models[name] if name in self.loaded else None

    def _read(self, opened: Opened, tokens: list[int]) -> list[float | None]:
        engine = opened.engine
        sampling = Sampling(max_new_tokens=1, prompt_log_probs=True)
        engine.add(Request(prompt=np.array(tokens, np.int32), sampling=sampling))
        found: list[float | None] = [None]
        while engine.busy:
            for news in engine.step():
                found += [said.log_prob for said in news.prompt or ()]
        return found

    def _say(self, opened: Opened, tokens: list[int], sampling: Sampling) -> Said:
        [said] = opened.engine.speak([np.array(tokens, np.int32)], sampling)
        return said.tokens.tolist(), said.log_probs, said.ended, list(said.likeliest)

    def _completions(self, body: Any) -> Answer:
        opened = self._model(body["model"])
        if opened is None:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        prompt = body["prompt"]
        if body.get("echo"):
            tokens, numbers, ended, tops = prompt, self._read(opened, prompt), "length", []
        else:
            sampling = Sampling(max_new_tokens=body["max_tokens"], temperature=body["temperature"], seed=body["seed"],
                                stop_ids=tuple(body["stop_token_ids"]), likeliest=body["logprobs"])  # fmt: skip
            tokens, numbers, ended, tops = self._say(opened, prompt, sampling)
        told = {"tokens": [f"token_id:{each}" for each in tokens], "token_logprobs": numbers, "text_offset": [],
                "top_logprobs": [{f"token_id:{token}": one for token, one in each} for each in tops]}  # fmt: skip
        return 200, {"choices": [{"index": 0, "text": "", "logprobs": told, "finish_reason": ended}]}

    def _generate(self, body: Any) -> Answer:
        opened = self._model(body.get("lora_path", ""))
        if opened is None:
            return 400, {"error": {"message": "The following requested LoRA adapters are not loaded"}}
        prompt, knobs = body["input_ids"], body["sampling_params"]
        sampling = Sampling(max_new_tokens=knobs["max_new_tokens"], temperature=knobs["temperature"],
                            stop_ids=tuple(knobs.get("stop_token_ids", ())),
                            likeliest=body.get("top_logprobs_num", 0))  # fmt: skip
        tokens, numbers, ended, tops = self._say(opened, prompt, sampling)
        meta: dict[str, Any] = {"finish_reason": {"type": ended}, "prompt_tokens": len(prompt)}
        if body.get("logprob_start_len", -1) == 0:
            meta["input_token_logprobs"] = [[each, token, None] for each, token in
                                            zip(self._read(opened, prompt), prompt, strict=True)]  # fmt: skip
        meta["output_token_logprobs"] = [[each, token, None] for each, token in zip(numbers, tokens, strict=True)]
        meta["output_top_logprobs"] = [[[one, token, None] for token, one in each] for each in tops]
        return 200, {"text": "", "output_ids": tokens, "meta_info": meta}

    def _adapters(self, _body: Any) -> Answer:
        names = enumerate(self.loaded)
        return 200, [{"id": place, "path": f"/models/{name}.gguf", "scale": 0.0} for place, name in names]

    def _completion(self, body: Any) -> Answer:
        on = [self.loaded[each["id"]] for each in body["lora"] if each["scale"]]
        opened = self._model(on[0] if on else "")
        assert opened is not None and not body["post_sampling_probs"]
        sampling = Sampling(max_new_tokens=body["n_predict"], temperature=body["temperature"], seed=body["seed"],
                            likeliest=body["n_probs"])  # fmt: skip
        tokens, numbers, ended, tops = self._say(opened, body["prompt"], sampling)
        told = [{"id": token, "token": "", "logprob": number, "top_logprobs": [{"id": one, "logprob": log_prob} for
                 one, log_prob in top]} for token, number, top in zip(tokens, numbers, tops, strict=True)]  # fmt: skip
        return 200, {"content": "", "tokens": tokens, "completion_probabilities": told,
                     "stop_type": "limit" if ended == "length" else "eos"}  # fmt: skip


@contextlib.contextmanager
def foreign(engine: Foreign) -> Iterator[Foreign]:
    """Let it listen until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_words: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            engine.asked.append((self.path, dict(self.headers), body))
            if engine.pause:
                time.sleep(engine.pause)
            if engine.redirect:
                self.send_response(307)
                self.send_header("Location", engine.redirect + self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if engine.token and self.headers.get("Authorization") != f"Bearer {engine.token}":
                status, answer = 401, {"error": "Unauthorized"}
            else:
                status, answer = (engine.script or engine.answer)(self.path, body)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    # Whoever still computes is waited for: torch does not like to be left behind.
    server.daemon_threads = False
    engine.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
