"""The policy of a mixture as its own draft model, on the mixture's weights.

vLLM loads a draft model beside its target. Where both are one folder, the draft is the policy alone. It has the layers
of the mixture's policy, so it takes no memory for weights or a KV cache, and follows each weight sync. What holds the
layers is its own, since vLLM compiles it, and captures CUDA graphs of it, with the buffers of its caller.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import initialize_model

from logitmix.serving.vllm_patches import member_vllm_config


def drafts_for_itself(vllm_config: VllmConfig) -> bool:
    """Whether the model of this configuration is a draft for the same mixture."""
    speculative = vllm_config.speculative_config
    if speculative is None or vllm_config.model_config.runner_type != "draft":
        return False
    return Path(vllm_config.model_config.model).resolve() == Path(speculative.target_model_config.model).resolve()


class PolicyDraft(nn.Module):
    """The policy of a mixture that vLLM has loaded, as a vLLM model with the policy's own `attention_layers`.

    Raises `ValueError` if the policy runs together with other members, as adapters of one model do.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, mixture: Any) -> None:
        super().__init__()
        together = mixture.shared["policy"].members
        if len(together) > 1:
            raise ValueError(
                f"the draft is the mixture itself, but its policy runs in one pass with {', '.join(together[1:])}; "
                "name the folder of another draft model"
            )
        registry = vllm_config.compilation_config.static_forward_context
        known = set(registry)
        draft = initialize_model(member_vllm_config(vllm_config, "policy", mixture.config.policy), prefix=prefix)
        share_layers(draft, mixture.policy)
        for name in registry.keys() - known:  # of layers that were replaced
            del registry[name]
        self.attention_layers = [m.layer_name for m in draft.modules() if isinstance(m, Attention)]
        self.draft = (draft,)  # not a submodule: vLLM would load and repack its weights a second time

    def forward(self, input_ids: Tensor, positions: Tensor, **kwargs: Any) -> Tensor:
        return self.draft[0](input_ids, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.draft[0].compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load nothing: the mixture has loaded them."""
        return set()


def share_layers(model: nn.Module, other: nn.Module) -> None:
    """Replace the layers of `model` by those of `other`, of one architecture, but not what holds its attention."""
    for name, child in list(model.named_children()):
        holds_attention = any(isinstance(module, Attention) for module in child.modules())
        if holds_attention and not isinstance(child, Attention):
            share_layers(child, other.get_submodule(name))
        else:
            model.add_module(name, other.get_submodule(name))
    for name in [name for name, _ in model.named_parameters(recurse=False)]:
        model.register_parameter(name, other.get_parameter(name))
