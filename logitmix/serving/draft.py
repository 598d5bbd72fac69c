"""A member of a mixture as its draft model, on the mixture's weights.

Shape legend: N tokens, V the mixture's vocabulary.

vLLM loads a draft model beside its target. Where both are one folder, the draft is one member alone: the policy, or
the one that `draft_member` names in the mixture's configuration. It has the layers of that member, so it takes no
memory for weights or a KV cache, and follows each weight sync. The modules that contain the layers are its own, since
vLLM compiles them, and captures CUDA graphs of them, with the buffers of their caller.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import initialize_model

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.serving.vllm_patches import member_vllm_config


def drafts_for_itself(vllm_config: VllmConfig) -> bool:
    """Whether the model of this configuration is a draft for the same mixture."""
    speculative = vllm_config.speculative_config
    if speculative is None or vllm_config.model_config.runner_type != "draft":
        return False
    return is_same_folder(vllm_config.model_config.model, speculative.target_model_config.model)


def is_same_folder(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def draft_member(config: LogitMixConfig) -> str:
    """The member that drafts. Raises `ValueError` for an unknown one, and for one that runs together with others."""
    member = config.resolve_member_name(getattr(config, "draft_member", "policy"))
    together = [name for name in config.members if config.model_of(name) == config.model_of(member)]
    if len(together) > 1:
        others = ", ".join(name for name in together if name != member)
        raise ValueError(
            f"the draft is the mixture itself, but its {member} runs in one pass with {others}; name the folder of "
            "another draft model"
        )
    return member


class MemberDraft(nn.Module):
    """A member of a mixture that vLLM has loaded, as a vLLM model with the member's own `attention_layers`.

    Its hidden states have the mixture's width, that of its widest member, which vLLM holds them in.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, mixture: Any) -> None:
        super().__init__()
        member = draft_member(mixture.config)
        registry = vllm_config.compilation_config.static_forward_context
        known = set(registry)
        config = member_vllm_config(vllm_config, member, getattr(mixture.config, member))
        draft = initialize_model(config, prefix=prefix)
        share_layers(draft, getattr(mixture, member))
        for name in registry.keys() - known:  # of layers that were replaced
            del registry[name]
        self.attention_layers = [m.layer_name for m in draft.modules() if isinstance(m, Attention)]
        self.width = getattr(mixture.config, member).get_text_config().hidden_size
        self.padding = mixture.config.hidden_size - self.width
        self.vocab_size = mixture.vocab_size
        self.draft = (draft,)  # not a submodule: vLLM would load and repack its weights a second time

    def forward(self, input_ids: Tensor, positions: Tensor, **kwargs: Any) -> Tensor:
        return nn.functional.pad(self.draft[0](input_ids, positions), (0, self.padding))

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The member's logits `[N, V]` of the mixture's vocabulary, without the padding of its own.

        None on ranks above 0 if vLLM gathers them on rank 0.
        """
        logits: Tensor | None = self.draft[0].compute_logits(hidden_states[:, : self.width].contiguous())
        return None if logits is None else logits[:, : self.vocab_size].contiguous()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load nothing: the mixture has loaded them."""
        return set()


def share_layers(model: nn.Module, other: nn.Module) -> None:
    """Replace the layers of `model` by those of `other`, but not the modules that contain attention layers.

    Both models have one architecture.
    """
    for name, child in list(model.named_children()):
        holds_attention = any(isinstance(module, Attention) for module in child.modules())
        if holds_attention and not isinstance(child, Attention):
            share_layers(child, other.get_submodule(name))
        else:
            model.add_module(name, other.get_submodule(name))
    for name in [name for name, _ in model.named_parameters(recurse=False)]:
        model.register_parameter(name, other.get_parameter(name))
