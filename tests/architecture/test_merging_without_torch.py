"""Merging is arithmetic on files: without the gate, which runs models, none of it imports torch, refusals included."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.model.files.shards import INDEX, SINGLE
from luthier.store.manifest import write_manifest
from luthier.store.runs import ADAPTER, RunDirectory
from tests.architecture.source import SOURCE
from tests.merge.models_of import WIDTH, folder, tensors

HEAVY = ("torch", "transformers", "tokenizers", "pyarrow", "scipy")
COMMANDS = f"""
import contextlib, errno, io, json, os, sys
from luthier.cli.main import run
def full(*given):
    raise OSError(errno.ENOSPC, "No space left on device")
found = []
for name, arguments in json.loads(sys.argv[1]):
    said, keep = io.StringIO(), os.posix_fallocate
    if name == "full disk":
        os.posix_fallocate = full
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = run(["merge", *arguments])
    os.posix_fallocate = keep
    found.append([name, code, said.getvalue(), [heavy for heavy in {HEAVY!r} if heavy in sys.modules]])
print(json.dumps(found))
"""
PLAIN = ("--set", "parity=none")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, words and heavy modules of many merges in one process."""
    home = tmp_path_factory.mktemp("merges")
    one, two = (str(folder(home / name, tensors(seed=seed), dtype=torch.bfloat16, shard_bytes=400))
                for name, seed in (("one", 1), ("two", 2)))  # fmt: skip
    base = str(folder(home / "base", tensors(seed=0), words=["a", "b"]))
    other = folder(home / "wide", {**tensors(seed=3), "model.norm.weight": torch.ones(9)})
    lost, out_of, spoilt = (folder(home / name, tensors(seed=4), shard_bytes=400) for name in ("lost", "out_of", "nan"))
    next(lost.glob("model-*.safetensors")).unlink()
    index = json.loads((out_of / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../outside.safetensors"
    (out_of / INDEX).write_text(json.dumps(index))
    for path in spoilt.glob("model-*.safetensors"):
        held = load_file(path)
        if "lm_head.weight" in held:
            held["lm_head.weight"][1, 1] = float("nan")
            save_file(held, path, metadata={"format": "pt"})
    (yaml := home / "mergekit.yaml").write_text(json.dumps({
        "merge_method": "dare_ties", "base_model": base, "dtype": "bfloat16",
        "models": [{"model": each, "parameters": {"weight": [0.2, 0.8], "density": 0.5}} for each in (one, two)],
    }))  # fmt: skip
    (adapter := home / "adapter").mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": base,
    }))  # fmt: skip
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{name}.lora_A.weight": torch.ones(2, WIDTH), f"{name}.lora_B.weight": torch.ones(WIDTH, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    with RunDirectory.begin(home / "run") as run:
        run.write_recipe({"model": base})
        shutil.copytree(adapter, run.folder / ADAPTER)
        write_manifest(run.folder / ADAPTER, {})
    tuned = {"models": [{"model": base, "adapter": str(adapter)}], "method": {"method": "passthrough"}}
    (with_adapter := home / "tuned.yaml").write_text(json.dumps(tuned))
    out = ("--out", str(home / "out"))
    commands = {
        "help": ["--help"],
        "dry run": [one, two, "--dry-run", "--json"],
        "dry run of a file": [str(yaml), "--dry-run"],
        "slerp": [one, two, *PLAIN, "--out", str(home / "slerp"), "--json"],
        "mergekit": [str(yaml), *PLAIN, "--out", str(home / "mergekit")],
        "an adapter on its base": [str(with_adapter), *PLAIN, "--out", str(home / "tuned")],
        "a run": [str(run.folder), base, *PLAIN, "--out", str(home / "of a run")],
        "adapters, dry run": [str(adapter), str(adapter), "--adapters", "--method", "cat", "--dry-run"],
        "no such method": [one, two, "--method", "slurp", *out],
        "no such key": [one, two, "--set", "densty=1", *out],
        "no base": [one, two, "--method", "ties", *out],
        "shapes": [one, str(other), *out],
        "missing shard": [one, str(lost), *out],
        "index leads out": [one, str(out_of), *out],
        "not finite": [one, str(spoilt), *PLAIN, *out],
        "full disk": [one, two, *PLAIN, *out],
        "not a model": [one, str(home), *out],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(list(commands.items()))], check=False, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (home / "out").exists() and (home / "mergekit" / SINGLE).is_file()
    return {name: (code, words, heavy) for name, code, words, heavy in json.loads(done.stdout.splitlines()[-1])}


def test_a_merge_a_dry_run_and_a_refusal_import_no_torch(said: dict[str, tuple[int, str, list[str]]]) -> None:
    """Breaks when a module of the way imports it: a second of each merge, and of each answer to a slip."""
    # In the order of the commands, so that the first that brings one is named.
    heavy = {name: modules for name, (_, _, modules) in said.items() if modules}
    assert not heavy, f"`merge` imports it: {heavy}"
    codes = {name: code for name, (code, _, _) in said.items()}
    wanted = dict.fromkeys(("help", "dry run", "dry run of a file", "slerp", "mergekit", "an adapter on its base",
                            "a run", "adapters, dry run"), 0)  # fmt: skip
    wanted |= dict.fromkeys(("no such method", "no such key", "no base", "shapes", "not a model"), 2)
    wanted |= {"missing shard": 69, "index leads out": 77, "not finite": 76, "full disk": 74}
    assert codes == wanted, {name: said[name][:2] for name in codes if codes[name] != wanted.get(name)}
