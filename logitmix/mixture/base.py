"""How a mixture holds its members: each is a submodule, or the policy's submodule with an adapter of its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.mixture.adapters import Adapters, adapter_layers, adapter_parameters
from logitmix.mixture.configuration import NO_ADAPTER, Alpha, LogitMixConfig, resolve_weights
from logitmix.mixture.dtypes import dtypes_of
from logitmix.mixture.frozen.references import REFERENCES
from logitmix.mixture.member_prompts import MemberPrompts, Prompts
from logitmix.mixture.mixing import Weights
from logitmix.mixture.quantization import num_bytes, save_quantized


class MixtureBase(PreTrainedModel):
    """A model of a trainable policy and frozen anchors: whatever differs from a single model except its forward.

    Its submodules are named by `config.model_names`, the policy first. An anchor without a submodule shares the
    policy's: it is that model with another adapter, or with none.
    """

    config: LogitMixConfig
    policy: PreTrainedModel
    adapters: Adapters | None
    _cache_layers: list[int]
    tokenizer: PreTrainedTokenizerBase | None
    sources: dict[str, str]  # the folders or hub ids of frozen members that `from_members` loaded

    @property
    def members(self) -> list[PreTrainedModel]:
        """The models that run the policy and the anchors, in the order of the weights."""
        return [getattr(self, self.config.model_of(name)) for name in self.config.members]

    @property
    def anchors(self) -> list[PreTrainedModel]:
        """The anchors that have a model of their own."""
        return [getattr(self, name) for name in self.config.model_names[1:]]

    @contextmanager
    def as_member(self, name: str) -> Iterator[PreTrainedModel]:
        """Within the context, the model yielded is the member `name`.

        Outside it the policy's model is the policy, also for a backward pass that recomputes activations.
        """
        model: PreTrainedModel = getattr(self, self.config.model_of(name))
        if self.adapters is None or name not in self.config.adapters or name == "policy":
            yield model
        else:
            with self.adapters.as_member(name, then="policy"):
                yield model

    def _freeze_anchors(self) -> None:
        for anchor in self.anchors:
            anchor.requires_grad_(False)
            anchor.eval()
        if self.adapters is not None:
            self.adapters.train_only("policy")

    @property
    def has_quantized_base(self) -> bool:
        """Whether the policy is an adapter on a model with quantised weights."""
        return "policy" in self.config.adapters and "policy" in self.config.quantized_models

    def attach(self, models: Mapping[str, PreTrainedModel]) -> None:
        """Make each model the member of its name, frozen where it is an anchor."""
        for name, model in models.items():
            self.add_module(name, model)
            setattr(self.config, name, model.config)
        if "policy" in models and self.config.adapters:
            self.adapters = Adapters(self.policy, self.config.members)
        self._freeze_anchors()

    def train(self, mode: bool = True) -> Self:
        """Set the policy's training mode; the anchors stay in evaluation mode (no dropout, no checkpointing)."""
        super().train(mode)
        for anchor in self.anchors:
            anchor.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let the policy require gradients, of a policy with an adapter only that; the anchors stay frozen."""
        if self.adapters is not None:
            self.adapters.train_only("policy", requires_grad)
        else:
            self.policy.requires_grad_(requires_grad)
        return self

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: on loading, the members are initialised as transformers' own classes, which they are.

        In custom code transformers skips `_init_weights` of a module without weights of its own; the buffers that it
        fills in a child (Falcon-H1's `mup_vector`) would stay uninitialised.
        """
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The policy's embeddings; the anchors keep theirs."""
        embeddings: nn.Module = self.policy.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.policy.set_input_embeddings(value)

    def get_output_embeddings(self) -> None:
        """None: no single matrix maps a hidden state to the mixture's logits."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        raise ValueError("a mixture cannot resize its vocabulary; resize every member, then build the mixture")

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the configurations, every member's weights, and the tokenizer if known."""
        for model in self.members:
            unknown = set(getattr(model, "peft_config", {})) - set(self.config.adapters)
            if unknown:  # transformers would save the adapter's layers under names that it cannot load
                raise ValueError(
                    f"a member has a PEFT adapter {sorted(unknown)[0]!r} that the mixture does not know; merge it, or "
                    "build the mixture with from_members(…, peft_config=…)"
                )
        self.config.member_dtypes = dtypes_of(self.members)
        self.config.set_plausibility(self.config.plausibility, self.config.plausibility_member)
        self.config.set_member_prompts(self.config.member_prompts)
        quantized = {name: getattr(self, name) for name in self.config.quantized_models}
        if self.has_quantized_base:
            if kwargs.get("state_dict") is None:
                raise ValueError(
                    "the policy is an adapter on a quantised base, which a mixture is not saved with; save its "
                    "adapter, with export_member('policy', folder), or train it, whose checkpoints refer to the base"
                )
            del quantized["policy"]
        if quantized:
            state = kwargs.get("state_dict")
            is_main = kwargs.get("is_main_process", True)
            state = self.state_dict() if state is None else state
            kwargs["state_dict"] = save_quantized(quantized, state, save_directory, is_main_process=is_main)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            Path(save_directory, REFERENCES).unlink(missing_ok=True)  # of a checkpoint that was here before
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(save_directory)

    def describe_members(self) -> list[str]:
        """A readable name of each member: its model's folder or hub id, and whether it is an adapter on it."""
        names = []
        for name, model in zip(self.config.members, self.members, strict=True):
            adapter, base = self.config.adapters.get(name), model.name_or_path or type(model).__name__
            names.append(base if adapter in (None, NO_ADAPTER) else f"a LoRA adapter on {base}")
        return names

    def weight_bytes(self) -> tuple[int, int]:
        """Bytes of the weights, and bytes saved by members that share a model instead of having one each."""
        held = {id(p): p for p in self.parameters()}
        num_sharing = len(self.config.members) - len(self.config.model_names)
        adapters = {id(p) for _, layer in adapter_layers(self.policy) for p in adapter_parameters(layer)}
        base = {id(p): p for p in self.policy.parameters() if id(p) not in adapters}
        return sum(map(num_bytes, held.values())), num_sharing * sum(map(num_bytes, base.values()))

    def _resolve_weights(self, alpha: Alpha | None, weights: Weights | None) -> Tensor:
        default = self.config.weights
        return resolve_weights(alpha, weights, len(default), self.config.scheme, default)

    def _member_prompts(
        self, prompts: MemberPrompts | Mapping[str, Prompts] | None, input_ids: Tensor | None
    ) -> MemberPrompts | None:
        prompts = self.config.member_prompts if prompts is None else prompts
        return None if prompts == {} else MemberPrompts.of(prompts, self.config, input_ids, self.tokenizer)
