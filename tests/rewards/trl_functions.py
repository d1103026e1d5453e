"""Reward functions as people write them for TRL; test_function.py names them."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

CONSTANT = 1


@dataclass
class Weight:
    of: float = 2.0


def capitals(completions, **kwargs):
    return [float(completion[0]["content"].isupper()) for completion in completions]


def same_as_column(completions, answer, **kwargs):
    return [float(said[0]["content"] == known) for said, known in zip(completions, answer, strict=True)]


def types(prompts, completions, **kwargs):
    kinds = {str: 1.0, list: 2.0}
    assert all(type(one) is type(two) for one, two in zip(prompts, completions, strict=True))
    return [kinds[type(one)] for one in completions]


def everything(prompts, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
    log_metric("seen", len(prompts))
    log_extra("letters", [len(ids) for ids in completion_ids])
    log_extra("words", ["no number"] * len(prompts))
    return [len(ids) + trainer_state.global_step / trainer_state.max_steps for ids in completion_ids]


def letters(completion_ids):
    return [len(ids) for ids in completion_ids]


async def later(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def make(factor):
    def made(completion_ids, **kwargs):
        return [factor * len(ids) for ids in completion_ids]

    return made


def sometimes(completions, answer, **kwargs):
    return [1.0 if said[0]["content"] == known else None for said, known in zip(completions, answer, strict=True)]


def tensors(completion_ids, **kwargs):
    return [torch.tensor(float(len(ids))) for ids in completion_ids]


def raises(completions, **kwargs):
    return [kwargs["nowhere"] for _ in completions]


def short(completions, **kwargs):
    return [1.0]


def texts(completions, **kwargs):
    return ["good"] * len(completions)


def nothing(completions, **kwargs):
    return None


def not_a_number(completions, **kwargs):
    return [float("nan")] * len(completions)


def infinite(completions, **kwargs):
    return [float("inf")] * len(completions)


def huge(completions, **kwargs):
    return [10**5000] * len(completions)


def array(completion_ids, **kwargs):
    return np.array([len(ids) for ids in completion_ids], dtype=np.float32)


def tensor(completion_ids, **kwargs):
    return torch.tensor([len(ids) for ids in completion_ids])


def table(completion_ids, **kwargs):
    return torch.zeros(len(completion_ids), 1)


def weighed(completion_ids, **kwargs):
    return [Weight().of for _ in completion_ids]


def leaves(completions, **kwargs):
    sys.exit(0)


def hangs(completions, **kwargs):
    time.sleep(60)
