"""The configurations of a mixture's members taken together: the attributes that transformers reads of a model."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs


class MemberConfigs:
    """Sizes, layers and other attributes of a mixture, from the configurations of its members.

    Each configuration is an attribute with the name of its model. Members in `adapters` run on the policy's.
    """

    members: list[str]
    adapters: dict[str, Any]

    def model_of(self, member: str) -> str:
        """The name of the model that runs the member: its own, or `"policy"` if it shares the policy's."""
        return "policy" if member in self.adapters else member

    @property
    def model_names(self) -> list[str]:
        """The members with a model of their own: these are submodules of the mixture and have a configuration."""
        return [name for name in self.members if self.model_of(name) == name]

    @property
    def quantized_models(self) -> list[str]:
        """Those of `model_names` with quantised weights, as their own configurations say."""
        configs = {name: getattr(self, name, None) for name in self.model_names}
        return [name for name, config in configs.items() if getattr(config, "quantization_config", None) is not None]

    @property
    def member_configs(self) -> list[PreTrainedConfig]:
        """The configurations of the models that run the members, in the order of `weights`."""
        return [getattr(self, self.model_of(name)) for name in self.members]

    @property
    def sub_configs(self) -> dict[str, type[PreTrainedConfig]]:  # type: ignore[override]
        """A property, not a class attribute as in transformers, because the members differ between instances."""
        return {name: type(getattr(self, name)) for name in self.model_names if hasattr(self, name)}

    @property
    def _text_configs(self) -> list[PreTrainedConfig]:
        return [config.get_text_config(decoder=True) for config in self.member_configs]

    @property
    def vocab_size(self) -> int:
        """Number of tokens that every member has a logit for; members may pad their vocabulary beyond it."""
        return min(config.vocab_size for config in self._text_configs)

    @property
    def hidden_size(self) -> int:
        return max(config.hidden_size for config in self._text_configs)

    @property
    def context_lengths(self) -> list[int | None]:
        """The context of each member, in the order of `weights`; None for one that states none."""
        return [getattr(config, "max_position_embeddings", None) for config in self._text_configs]

    @property
    def max_position_embeddings(self) -> int | None:
        """The shortest context of the members, None if no member states one."""
        return min((context for context in self.context_lengths if context is not None), default=None)

    # Attributes on which all layers of all members agree; if they differ, as in Gemma 4, the attribute does not exist.

    @property
    def num_attention_heads(self) -> int:
        return self._shared("num_attention_heads")

    @property
    def num_key_value_heads(self) -> int:
        return self._shared("num_key_value_heads")

    @property
    def head_dim(self) -> int:
        return self._shared("head_dim")

    # The policy's, from which TRL reads whether the loss has a load-balancing term; absent where the policy has none.

    @property
    def output_router_logits(self) -> bool:
        return self._text_configs[0].output_router_logits

    @property
    def router_aux_loss_coef(self) -> float:
        return self._text_configs[0].router_aux_loss_coef

    def _shared(self, name: str) -> Any:
        values = [getattr(layer, name) for config in self._text_configs for layer in config.per_layer_config]
        if any(value != values[0] for value in values):
            raise AttributeError(f"the members' layers differ in {name}: {values}")
        return values[0]

    # One KV cache serves all members, each with its own range of layers, so the attributes from which transformers
    # builds a cache concatenate those of the members.

    @property
    def cache_layers(self) -> list[int]:
        """The number of layers of each member in the mixture's KV cache."""
        return [len(get_layer_types_and_kwargs(config)[0]) for config in self._text_configs]

    @property
    def num_hidden_layers(self) -> int:
        return sum(self.cache_layers)

    @property
    def layer_types(self) -> list[str]:
        return [name for config in self._text_configs for name in get_layer_types_and_kwargs(config)[0]]

    def validate(self) -> None:
        """Each member's configuration validates its own, by rules of its own: Nemotron-H has other types of layers."""

    @property
    def per_layer_config(self) -> list[PreTrainedConfig]:  # type: ignore[override]
        layers = []
        for config, count in zip(self._text_configs, self.cache_layers, strict=True):
            layers.extend(list(config.per_layer_config)[:count])
        return layers
