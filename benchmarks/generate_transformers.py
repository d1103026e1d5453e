"""transformers, and PEFT on it, as one process of `generate.py`. Runs in the peer's own virtual environment.

`generate` is a static batch, padded on the left, with the default cache and SDPA attention; it runs until the longest
answer is done. `continuous` is `generate_batch`. `adapter_names` is PEFT's mixed batch. No end-of-sequence token is
known to any of them, so that answers have the lengths that were asked for.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import generate_work
import procfs
import torch
import transformers
from devices import Device
from generate_work import Answered, Job
from probes import probe

CACHE_SHARE = 0.3
"""Of the memory that is free, what continuous batching may take for keys: far more than the workloads need."""


def make(job: Job) -> Any:
    """The prepared model, with its adapters where PEFT is asked for them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job.folder / "model", dtype=getattr(torch, job.precision), attn_implementation="sdpa"
    )
    model.eval()
    model.generation_config.eos_token_id = None
    if job.settings["way"] != "adapter_names":
        return model
    import peft

    # In the model's precision: upcast factors, PEFT's default, would be slower.
    names = [f"a{number:02d}" for number in range(job.work.adapters)]
    mixed = peft.PeftModel.from_pretrained(model, job.adapter(0), adapter_name=names[0], autocast_adapter_dtype=False)
    for number, name in enumerate(names[1:], 1):
        mixed.load_adapter(job.adapter(number), adapter_name=name, autocast_adapter_dtype=False)
    mixed.to(getattr(torch, job.precision))
    return mixed.eval()


class FirstToken(transformers.StoppingCriteria):
    """Notes when the first token of every row is there, and stops nothing."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.at = time.perf_counter() if self.at is None else self.at
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.no_grad()
def answer(model: Any, job: Job, prompts: list[list[int]], answers: list[int]) -> Answered:
    if job.settings["way"] == "continuous":
        return _continuous(model, prompts, answers)
    started = time.perf_counter()
    clock = FirstToken()
    given: dict[str, Any] = {"max_new_tokens": max(answers), "do_sample": False}
    if job.work.shared:
        given |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": len(prompts)}
        prompts = prompts[:1]
    if job.settings["way"] == "adapter_names":
        given["adapter_names"] = [f"a{index % job.work.adapters:02d}" for index in range(len(prompts))]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    criteria = transformers.StoppingCriteriaList([clock])
    found = model.generate(input_ids=ids, attention_mask=mask, stopping_criteria=criteria, pad_token_id=0, **given)
    said = [row[:count] for row, count in zip(found[:, width:].tolist(), answers, strict=True)]
    return Answered(said, (clock.at or started) - started)


def _continuous(model: Any, prompts: list[list[int]], answers: list[int]) -> Answered:
    started = time.perf_counter()
    known = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0, "max_new_tokens": max(answers)}
    config = transformers.GenerationConfig(**known)
    first: dict[str, float] = {}
    said: dict[str, list[int]] = {}
    # One that stays: its cache, which it takes at once and fills with zeros, is part of starting up.
    room = transformers.ContinuousBatchingConfig(max_memory_percent=CACHE_SHARE)
    given = {"generation_config": config, "continuous_batching_config": room, "persistent_manager": True}
    with model.continuous_batching_context_manager(**given) as manager:
        for index, (prompt, count) in enumerate(zip(prompts, answers, strict=True)):
            own = {"request_id": str(index), "max_new_tokens": count, "eos_token_id": -1}
            manager.add_request(prompt, record_timestamps=True, **own)
        while len(said) < len(prompts):
            result = manager.get_result(timeout=1.0)
            if result is None:
                if not manager.is_running():
                    raise SystemExit("the continuous batching of transformers has ended without a word")
                continue
            if result.error:
                raise SystemExit(f"the continuous batching of transformers failed: {result.error}")
            if result.is_finished():
                said[result.request_id] = list(result.generated_tokens)
                first[result.request_id] = result.timestamps[0]
    last = max(first.values()) - started
    return Answered([said[str(index)] for index in range(len(prompts))], last)


def main() -> int:
    job = generate_work.job_from_arguments()
    torch.manual_seed(0)
    device = Device("cpu")
    before = probe(job.precision, device, widest=job.widest)
    peak_is_fresh = device.forget_peak()
    model, prompts = make(job), generate_work.prompts_of(job)
    answers = [count for _, count in job.work.lengths()]
    answer(model, job, prompts, [generate_work.WARM_TOKENS] * len(answers))
    first = procfs.now()
    answered = answer(model, job, prompts, answers)
    clocks = procfs.between(first, procfs.now())
    peak = device.peak()
    generate_work.print_line(
        generate_work.result_line(
            job,
            answered,
            clocks=clocks,
            probes={"before": before, "after": probe(job.precision, device, widest=job.widest)},
            peak=peak | {"peak_excludes_probes": peak_is_fresh},
            machine=device.machine(),
            packages=("torch", "transformers", *["peft"] * (job.work.adapters > 0)),
            settings={"threads": torch.get_num_threads(), **job.settings},
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
