"""Two models of the size of 7 billion parameters are merged below 2 GB, the program itself included."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.kernels.floats import BFLOAT16
from luthier.model.files import shards
from luthier.model.files.shards import INDEX, Slot, shards_of
from tests.architecture.source import SOURCE

LAYERS, WIDTH, INNER, ROWS = 32, 4096, 11008, 32000
MOST = 2 * 10**9
MERGE = """
import resource, sys
from luthier.cli.main import run
code = run(["merge", *sys.argv[1:], "--json", "--quiet"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
sys.exit(code)
"""


def slots(layers: int) -> dict[str, Slot]:
    """The tensors of Llama-2 7B."""
    table = (ROWS, WIDTH)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for layer in range(layers):
        for name, shape in (
            ("self_attn.q_proj", (WIDTH, WIDTH)), ("self_attn.k_proj", (WIDTH, WIDTH)),
            ("self_attn.v_proj", (WIDTH, WIDTH)), ("self_attn.o_proj", (WIDTH, WIDTH)),
            ("mlp.gate_proj", (INNER, WIDTH)), ("mlp.up_proj", (INNER, WIDTH)), ("mlp.down_proj", (WIDTH, INNER)),
            ("input_layernorm", (WIDTH,)), ("post_attention_layernorm", (WIDTH,)),
        ):  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": table}
    return {name: Slot(BFLOAT16, shape) for name, shape in shapes.items()}


def sparse_model(place: Path, layers: int) -> Path:
    """A model of zeros whose files take no room on the disk."""
    place.mkdir()
    every, where = slots(layers), {}
    for number, names in enumerate(shards_of(every, 5 * 10**9), 1):
        laid_out = shards._laid_out({name: every[name] for name in names})
        header = shards._header(laid_out, "pt")
        path = place / f"model-{number}.safetensors"
        path.write_bytes(header)
        os.truncate(path, len(header) + max(each.end for each in laid_out.values()))
        where |= dict.fromkeys(names, path.name)
    (place / INDEX).write_text(json.dumps({"weight_map": where}))
    (place / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))
    return place


def peak(tmp_path: Path, method: str, layers: int, *, parity: str = "none") -> int:
    """The most that the command has held."""
    models = [str(sparse_model(tmp_path / name, layers)) for name in ("one", "other")]
    base = ["--base", str(sparse_model(tmp_path / "base", layers))] if method == "ties" else []
    done = subprocess.run(
        [sys.executable, "-c", MERGE, *models, "--method", method, *base, "--out", str(tmp_path / "out"),
         "--set", f"parity={parity}"],
        env={**os.environ, "PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["tensors"] == len(slots(layers))
    shutil.rmtree(tmp_path / "out")
    return int(done.stderr.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["slerp", "ties"])
def test_two_models_of_7_billion_parameters_are_merged_below_2_gb(tmp_path: Path, method: str) -> None:
    """Breaks when any tensor, or a queue of them, is held whole in float32."""
    if shutil.disk_usage(tmp_path).free < 16 * 10**9:
        pytest.skip("the result takes 13.5 GB")
    assert peak(tmp_path, method, LAYERS) < MOST


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_logits_are_compared_below_2_gb(tmp_path: Path) -> None:
    """Breaks when the gate holds a model, or a table of its size in float32."""
    if shutil.disk_usage(tmp_path).free < 4 * 10**9:
        pytest.skip("the result takes 2.2 GB")
    assert peak(tmp_path, "slerp", 4, parity="logits") < MOST
