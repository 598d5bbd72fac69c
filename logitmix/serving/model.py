"""The mixture as a vLLM model: runs the members, and mixes their logits at each request's weights.

Shape legend: N tokens, D width of a member's hidden states, V vocabulary, K members.

vLLM builds each member under its own prefix, so that its attention layers, its share of the KV cache and its weights
have their own names. `forward` runs the members on the same tokens and returns their hidden states side by side.
`compute_logits` splits them, projects each with its member's head, and mixes them at the weights of each token's
request, which the `Engine` of vLLM's model runner carries from one to the other.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from logitmix.mixture.frozen.loading import frozen_weights
from logitmix.serving.adapters import SharedModel
from logitmix.serving.config import engine_class
from logitmix.serving.draft import MemberDraft, drafts_for_itself
from logitmix.serving.vllm_patches import member_vllm_config, name_layers_of_drafts


class LogitMixForCausalLM(nn.Module):
    """`z_mix = sum_k w_k z_k` over members that vLLM supports (arXiv 2605.20555, eq. 1)."""

    policy: Any

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        """The mixture, or one member if vLLM builds the draft model for the same mixture."""
        if drafts_for_itself(vllm_config):
            mixture = vllm_config.speculative_config.mixture  # type: ignore[union-attr]
            return MemberDraft(vllm_config=vllm_config, prefix=prefix, mixture=mixture)
        return super().__new__(cls)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.speculative_config is not None:
            vllm_config.speculative_config.mixture = self  # type: ignore[attr-defined]  # for a draft of its layers
            name_layers_of_drafts(vllm_config)
        self.config = vllm_config.model_config.hf_config
        self.vocab_size = self.config.vocab_size
        # vLLM reads the files in this folder; later calls of `load_weights` bring weights from training
        self.unloaded_checkpoint: Path | None = Path(vllm_config.model_config.model)
        self.shared: dict[str, SharedModel] = {}
        for name in self.config.model_names:
            config = member_vllm_config(vllm_config, name, getattr(self.config, name))
            with set_model_tag(name):
                model = initialize_model(config, prefix=maybe_prefix(prefix, name))
            self.add_module(name, model)
            members = [member for member in self.config.members if self.config.model_of(member) == name]
            adapters = self.config.adapters if name == "policy" else {}
            self.shared[name] = SharedModel(model, members, adapters, vllm_config)
        text_configs = [
            getattr(self.config, self.config.model_of(name)).get_text_config() for name in self.config.members
        ]
        # the index of the member that runs alone, in alternating decoding
        self.turn: int | None = None
        self.engine = engine_class(vllm_config)(vllm_config, [config.hidden_size for config in text_configs])
        # members that share a linear head: mix the hidden states and project once
        self.has_one_head = (
            len(self.config.model_names) == 1
            and self.config.scheme == "logit"
            and self.config.plausibility is None
            and _has_linear_head(self.policy)
        )

    @property
    def members(self) -> list[Any]:
        """The models that run the members, in the order of the weights."""
        return [getattr(self, self.config.model_of(name)) for name in self.config.members]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError("each member embeds tokens itself")

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        request_weights: Tensor | None = None,
    ) -> Tensor:
        """The members' hidden states, joined with what `compute_logits` needs to find each row's weights.

        `request_weights` `[N, K]` are those of each token's request, which vLLM's second model runner passes.
        """
        if self.turn is not None:
            return self.shared[self.config.members[self.turn]].forward(input_ids, positions)[0]
        hidden: dict[str, Tensor] = {}
        for shared in self.shared.values():
            hidden |= zip(shared.members, shared.forward(input_ids, positions), strict=True)
        return self.engine.join([hidden[name] for name in self.config.members], request_weights)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The mixture's logits `[N, V]`; None on ranks above 0 if vLLM gathers them on rank 0.

        In a turn, those of the member that runs, in float32.
        """
        if self.turn is not None:
            own_NV: Tensor = self.members[self.turn].compute_logits(hidden_states)
            return own_NV[..., : self.vocab_size].float()
        hidden_ND, weights = self.engine.split(hidden_states)
        if self.has_one_head:
            mixed_ND = self.engine.mix(hidden_ND, weights, "logit").to(hidden_states.dtype)
            mixed_NV: Tensor | None = self.policy.compute_logits(mixed_ND)
            return mixed_NV
        logits_NV = [member.compute_logits(h_ND) for member, h_ND in zip(self.members, hidden_ND, strict=True)]
        if logits_NV[0] is None:
            return None
        return self.engine.mix([z_NV[..., : self.vocab_size] for z_NV in logits_NV], weights, self.config.scheme)

    def get_model_state_cls(self) -> type:
        """The state of the requests on vLLM's second model runner, which alone calls this."""
        from logitmix.serving.model_state import MixtureModelState

        return MixtureModelState

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights by their names in the checkpoint; first of all, also the frozen ones that it refers to."""
        folder, self.unloaded_checkpoint = self.unloaded_checkpoint, None
        referred = frozen_weights(folder, self.config) if folder is not None and folder.is_dir() else ()
        return AutoWeightsLoader(self).load_weights(self._without_adapters(chain(weights, referred)))

    def _without_adapters(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The models' own weights, under their names in a model without adapters."""
        for name, weight in weights:
            model, _, path = name.partition(".")
            if not self.shared[model].load_adapter_weight(path, weight):
                yield name.replace(".base_layer.", "."), weight


def _has_linear_head(model: nn.Module) -> bool:
    """Whether the logits are linear in the hidden state: they have no soft cap and no bias."""
    modules = list(model.modules())
    has_bias = any(isinstance(m, ParallelLMHead) and getattr(m, "bias", None) is not None for m in modules)
    return not has_bias and all(m.soft_cap is None for m in modules if isinstance(m, LogitsProcessor))
