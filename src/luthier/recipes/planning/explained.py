"""The formulas of a plan with its numbers put in, line by line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.core.units import bytes_text, count_text
from luthier.recipes.planning.plan import Laid
from luthier.recipes.schemas.offload import optimizer_is_far


def explained(laid: Laid, plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What each number of a plan comes from: its name, and the sum."""
    return [*_parameters(laid, plan), *_state(laid, plan), *_pass(laid, plan), *_work(laid, plan)]


def _parameters(laid: Laid, plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    shape, parameters = laid.shape, plan["parameters"]
    head = "is the table" if shape.tied else f"V d = {count_text(parameters['head'])}"
    matrices = " + ".join(f"{each.count} ({each.outputs} x {each.inputs})" for each in shape.matrices)
    return [
        ("parameters", f"table V d = {shape.vocabulary} x {shape.hidden} = {count_text(shape.table)}, head {head}; "
                       f"blocks {matrices} = {count_text(shape.blocks)}; norms and biases "
                       f"{count_text(shape.vectors)}; all {parameters['total']:,}"),
        ("trained", f"{laid.knobs.adapter.method_name()} says {parameters['trained']:,} for these layers"),
    ]  # fmt: skip


def _state(laid: Laid, plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    shape, memory, number = laid.shape, plan["memory"], laid.model.dtype.itemsize
    trained = max(1, plan["parameters"]["trained"])
    rest = shape.parameters - shape.blocks
    knobs = laid.knobs
    shared = "" if knobs.sharding == "none" else f"; {knobs.sharding} over {knobs.devices} devices"
    bits = 8 * max(0, memory["weights"] * _whole(laid, "weights") - rest * number) / shape.blocks
    far = optimizer_is_far(knobs.offload)
    packing = knobs.quantizer.method_name()
    packing += "" if packing == "none" else "; one matrix unpacked at a time"
    return [
        ("weights", f"blocks {count_text(shape.blocks)} x {bits:.2f} bits ({packing}) + {count_text(rest)} x {number} "
                    f"bytes = {bytes_text(memory['weights'])}{shared}"),
        ("their copies", f"{count_text(trained)} x {memory['trained'] / trained:.2f} bytes = "
                    f"{bytes_text(memory['trained'])}: what computes, and its float32 master"
                    f"{', which lies with the host' if far else ''}"),
        ("gradients", f"{count_text(trained)} x {memory['gradients'] / trained:.2f} bytes, "
                      f"{'two tensors at a time' if far else 'in float32'} = {bytes_text(memory['gradients'])}"),
        ("optimizer", f"{count_text(trained)} x {memory['optimizer'] / trained:.2f} bytes, as "
                      f"{knobs.optimizer.method_name()} says = {bytes_text(memory['optimizer'])}"),
    ]  # fmt: skip


def _whole(laid: Laid, part: str) -> int:
    return laid.knobs.devices if part == "weights" and laid.knobs.sharding in ("zero3", "fsdp") else 1


def _pass(laid: Laid, plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    decoder, memory = laid.formulas.decoder, plan["memory"]
    if laid.formulas.counted is not None:
        kept = "counted on a few tokens of this shape, told for all"
    else:
        numbers = 2 * (decoder.hidden + decoder.query + decoder.key_value + decoder.inner)
        kept = (
            f"2 d + 2 q + 2 kv + 2 f = {numbers:,} numbers of {decoder.bytes} bytes a token and block, and the ranks "
            f"of the adapter; {memory['recomputed']} of {decoder.layers} blocks keep d = {decoder.hidden:,} alone"
        )
    head = f"256 rows x V = {decoder.vocabulary:,} logits at a time, and what a block's backward pass works with"
    return [
        ("activations", f"{memory['tokens']:,} tokens: {kept} = {bytes_text(memory['activations'])}"),
        ("working", f"{head} = {bytes_text(memory['working'])}"),
    ]


def _work(laid: Laid, plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    shape, speed = laid.shape, plan["speed"]
    products = shape.active + laid.knobs.trained_share * shape.table
    share = speed["flops_per_token"] / max(1.0, products)
    told = [("FLOPs a token", f"{count_text(speed['flops_per_token'])} = {share:.2f} x {count_text(products)} "
             "parameters of products: 6 where all is trained, 4 where the base is frozen, and attention")]  # fmt: skip
    if speed["tokens_per_second"]:
        rate = f"{count_text(speed['flops_per_second'])}FLOP/s"
        told.append(
            ("time", f"{rate} x {speed['devices']} devices x {speed['efficiency']:g} of it / "
             f"({count_text(speed['flops_per_token'])} + {count_text(speed['recomputed_flops_per_token'])} made again) "
             f"= {_rate_text(speed['tokens_per_second'])} tokens/s at most")
        )  # fmt: skip
    return told


def _rate_text(rate: float) -> str:
    """Whole tokens, or two digits of what is less than ten of them."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
