"""From our own modules back to the zoo's, over the same parameters: for what only the zoo can do, as saving a model."""

from __future__ import annotations

from torch import nn

from luthier.core.errors import RecipeError
from luthier.model.attending import attention
from luthier.model.editing.edits import base_parameters
from luthier.model.files.configs import checked_config
from luthier.model.own.decoder import Decoder
from luthier.model.tasks import CAUSAL
from luthier.model.zoo import ZooModule


def zoo_module(module: ZooModule | Decoder) -> ZooModule:
    """The zoo's module with the weights of this one as they are now, nothing attached; a module of the zoo itself."""
    if not isinstance(module, Decoder):
        return module
    if module.files is None:
        raise RecipeError("a decoder that was made of no files", allowed="one that was loaded from a folder")
    from luthier.model.files.weights import take_generation_settings, without_weights

    attention.register()
    config = checked_config(module.files, quantized=False).config
    config.dtype, config.name_or_path = module.dtype, module.files.source
    made = without_weights(config, module.files.source, task=CAUSAL)
    held = base_parameters(module)
    for place, own in made.named_modules():
        for name in [name for name, each in own._parameters.items() if each is not None]:
            own._parameters[name] = held[f"{place}.{name}"]
    rotary: nn.Module = made.base_model.get_submodule("rotary_emb")
    for name in list(rotary._buffers):
        rotary._buffers[name] = module.model.rotary_emb.get_buffer("inv_freq")
    take_generation_settings(made, module.files)
    return made.train(module.training)
