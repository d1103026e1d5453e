"""merged: whole weights in a Hugging Face folder, for every program that loads one.

Idea: the adapter is folded into the weights in float32 and rounded once, so that the model needs no PEFT and costs no
more than its base to run. Around the weights lies what makes them the model that was trained: the tokenizer, the chat
template of the training, the stop tokens in generation_config.json, and a config in the words of transformers 4 and 5
both, because an older reader that misses a key takes its default without a word. What was trained on packed weights is
folded into the plain ones that they stand for.

Equation: W' = round(W + dW) at each site; files of at most `shard_gb` gigabytes, with an index where there are several.

Source: transformers' save_pretrained (shards, index); model/files/old_keys.py for the keys of both lines.

Cost: the bytes of the model, once on disk; in memory the model itself, which is asked before it is written, and one
tensor of the files. A model that is larger than memory is merged row by row: luthier merge RUN --method passthrough.

Use when: the model shall be served, quantized, merged with others or handed on as a whole.

Not when: one base serves many adapters (peft), or another program wants its own file (gguf, onnx).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from luthier.exporters import Exporter, Subject, Told
from luthier.model.comparing.parity import Side
from luthier.model.comparing.parity_sides import folder_side
from luthier.model.files.adapter_config import save_extras
from luthier.model.files.array_views import array_of, array_type
from luthier.model.files.json_files import read_object, write_object
from luthier.model.files.old_keys import with_old_keys
from luthier.model.files.shards import ShardWriter, Slot
from luthier.model.files.texts_beside import save_texts
from luthier.model.zoo import ZooModule

_USE = """```python
from transformers import AutoModelFor{kind}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelFor{kind}.from_pretrained("FOLDER")
```
"""
_KINDS = {"causal_lm": "CausalLM", "masked_lm": "MaskedLM", "sequence_classes": "SequenceClassification",
          "token_classes": "TokenClassification", "scores": "SequenceClassification",
          "seq2seq_lm": "Seq2SeqLM"}  # fmt: skip


@final
class Merged(Exporter):
    """A whole model in a folder."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="type of the weights in the files; auto keeps the one they were computed in"
    )
    shard_gb: float = Field(
        default=5.0, gt=0.0, le=100.0, description="largest file, in gigabytes; more weights make several files"
    )

    def dtype(self, subject: Subject) -> torch.dtype:
        """The type in which the weights are written."""
        if self.precision == "auto":
            return subject.model.dtype
        found: torch.dtype = getattr(torch, self.precision)
        return found

    def write(self, subject: Subject, place: Path, told: Told) -> None:
        """Weights, config, tokenizer, template and stop tokens."""
        model, module = subject.model, subject.model.module
        told(f"writing weights in {str(self.dtype(subject)).removeprefix('torch.')}")
        self._write_weights(module, place, self.dtype(subject))
        config = copy.deepcopy(module.config)
        config.dtype, config.architectures = str(self.dtype(subject)).removeprefix("torch."), [type(module).__name__]
        config.save_pretrained(place)
        write_object(place / "config.json", with_old_keys(read_object(place / "config.json")))
        save_texts(place, model, subject.tokenizer, chat_template=subject.chat_template, stop_ids=subject.stop_ids)
        save_extras(place, {"base": subject.base,
                            "task": {"name": model.task.name, "classes": list(model.task.classes)}})  # fmt: skip

    def _write_weights(self, module: ZooModule, place: Path, dtype: torch.dtype) -> None:
        """One tensor after another, in the type and under the names of the files; only one is copied at a time."""
        tensors = _saved(module)
        types = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
        slots = {name: Slot(array_type(types[name]), tuple(tensor.shape)) for name, tensor in tensors.items()}
        with ShardWriter(place, slots, shard_bytes=int(self.shard_gb * 1e9)) as writer:
            for name in writer.order:
                writer.write(name, array_of(tensors[name].to("cpu", types[name])))

    def read(self, subject: Subject, place: Path) -> Side:
        """The folder as `luthier` and transformers load it; computed in the precision of the source."""
        model = subject.model
        return folder_side(place, subject.reading, name="the merged folder", task=model.task,
                           precision=subject.precision, device=str(model.device))  # fmt: skip

    def usage(self, subject: Subject) -> str:
        """Loading it with transformers, and with luthier where it says text."""
        use = _USE.format(kind=_KINDS[subject.model.task.name])
        return use + ("\nOr `luthier generate FOLDER --prompt \"...\"`.\n" if subject.model.task.speaks else "")


def _saved(module: ZooModule) -> Mapping[str, Tensor]:
    """The tensors that its files hold, by their names there: a tied one once, and fused ones apart."""
    held = {name: tensor for name, tensor in module.state_dict().items()
            if name not in (module._keys_to_ignore_on_save or ())}  # fmt: skip
    found: Mapping[str, Tensor] = revert_weight_conversion(module, remove_tied_weights_from_state_dict(held, module))
    return found
