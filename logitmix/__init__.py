"""logitmix: a policy and its frozen anchors, mixed in the logits, as one causal language model.

Names are imported on first use: trl, vllm and matplotlib are not loaded until something needs them.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitmix.mixture.configuration import LogitMixConfig as LogitMixConfig
    from logitmix.mixture.mixing import mix_logits as mix_logits
    from logitmix.mixture.modeling import LogitMixForCausalLM as LogitMixForCausalLM
    from logitmix.training.config import LogitMixGRPOConfig as LogitMixGRPOConfig
    from logitmix.training.grpo import LogitMixGRPOTrainer as LogitMixGRPOTrainer

__version__ = version("logitmix")

_HOMES = {
    "LogitMixConfig": "logitmix.mixture.modeling",  # not configuration: it must come registered with its model
    "LogitMixForCausalLM": "logitmix.mixture.modeling",
    "LogitMixGRPOConfig": "logitmix.training.config",
    "LogitMixGRPOTrainer": "logitmix.training.grpo",
    "mix_logits": "logitmix.mixture.mixing",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'logitmix' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
