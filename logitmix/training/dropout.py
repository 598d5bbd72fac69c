"""Turning off all randomness of a model's training mode, so that a rollout and its scoring see the same model."""

import copy
import re

from torch import nn
from transformers import PreTrainedModel

_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# attention_dropout, layerdrop, router_jitter_noise, …
_RATE = re.compile(r"drop|jitter")


def disable_dropout(model: nn.Module) -> None:
    """Set every rate of dropout, of dropped layers and of router noise to 0; the model's configuration keeps its own.

    TRL's own switch reaches the modules of class `Dropout` only. Most architectures drop attention weights by a rate
    that a module holds as a number, and some read it from the configuration in each forward pass.
    """
    quiet = {}
    for module in model.modules():
        if isinstance(module, _LAYERS):
            module.p = 0.0
        for name in _rates(module):
            setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        # a model that is saved keeps its configuration; the parts inside it get a copy
        is_saved = isinstance(module, PreTrainedModel) and module.can_generate()
        if is_saved or config is None or not _rates(config):
            continue
        if id(config) not in quiet:
            quiet[id(config)] = copy.copy(config)
            for name in _rates(config):
                setattr(quiet[id(config)], name, 0.0)
        module.config = quiet[id(config)]


def _rates(holder: object) -> list[str]:
    """The attributes of a module or a configuration that are rates above 0."""
    return [name for name, value in vars(holder).items() if isinstance(value, float) and value and _RATE.search(name)]
