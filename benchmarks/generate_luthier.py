"""luthier's engine as one process of `generate.py`."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import generate_work
import numpy as np
import procfs
import torch
from devices import Device
from generate_work import Answered, Job
from probes import probe

from luthier.core.chosen import choose
from luthier.infer.engine import Engine
from luthier.infer.request import Request
from luthier.kernels import pool
from luthier.kernels.pool import bound_caches
from luthier.model.load import load_model
from luthier.model.speaker import Sampling
from luthier.quantizers import Quantizer
from luthier.recipes.opening.pooled import pool_of
from luthier.recipes.opening.quantized import quantize


def make(job: Job) -> Engine:
    """The engine over the prepared model, packed where that is asked for, its adapters registered."""
    # As `open_named` does it, here and below.
    pooled = not pool.install()
    model = load_model(
        str(job.folder / "model"), precision="bfloat16" if job.precision == "bfloat16" else "float32", device="cpu"
    )
    if "quantizer" in job.settings:
        quantize(model, choose("quantizers", Quantizer, str(job.settings["quantizer"])), head=True)
        if pooled:
            pool.release()
    model.train(False)
    adapters = {f"a{number:02d}": job.adapter(number) for number in range(job.work.adapters)}
    return Engine(model, pool=pool_of(model, adapters) if adapters else None)


def requests_of(job: Job) -> list[Request]:
    """The requests; a shared prompt is one request with as many choices."""
    prompts, lengths = generate_work.prompts_of(job), job.work.lengths()
    greedy = [Sampling(max_new_tokens=answer) for _, answer in lengths]
    if job.work.shared:
        drawn = replace(greedy[0], temperature=1.0)
        return [Request(prompt=np.array(prompts[0], np.int32), sampling=drawn, choices=len(prompts))]
    return [
        Request(
            prompt=np.array(prompt, np.int32),
            sampling=sampling,
            adapter=f"a{index % job.work.adapters:02d}" if job.work.adapters else "",
        )
        for index, (prompt, sampling) in enumerate(zip(prompts, greedy, strict=True))
    ]


def answer(engine: Engine, requests: list[Request]) -> Answered:
    """Let the engine answer all requests, which are there at once."""
    started = time.perf_counter()
    numbered = [(engine.add(request), request.choices) for request in requests]
    places = [(number, choice) for number, choices in numbered for choice in range(choices)]
    said: dict[tuple[int, int], list[int]] = {place: [] for place in places}
    first = 0.0
    silent = set(said)
    while engine.busy:
        for news in engine.step():
            said[news.request, news.choice].extend(each.token for each in news.said)
            silent.discard((news.request, news.choice))
        if not silent and not first:
            first = time.perf_counter() - started
    return Answered([said[place] for place in places], first)


def main() -> int:
    job = generate_work.job_from_arguments()
    bound_caches()
    device = Device("cpu")
    before = probe(job.precision, device, widest=job.widest)
    peak_is_fresh = device.forget_peak()
    engine, requests = make(job), requests_of(job)
    few = generate_work.WARM_TOKENS
    answer(engine, [replace(each, sampling=replace(each.sampling, max_new_tokens=few)) for each in requests])
    # What the warm-up has read must not be found again.
    engine.forget()
    first = procfs.now()
    answered = answer(engine, requests)
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
            packages=("torch", "transformers"),
            settings={"threads": torch.get_num_threads(), "kernels": engine.model.kernels, **job.settings},
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
