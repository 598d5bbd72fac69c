"""The private names of transformers that a mixture reads or sets, and the methods of `generate` that it overrides.

`tests/mixture/test_transformers_patches.py` has a test of each, which fails when a new version changes the name.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.generation import GenerationMode

Implementation = Literal["attn_implementation", "experts_implementation"]


def get_implementation(config: PreTrainedConfig, kind: Implementation) -> str | None:
    """The implementation that a member's configuration chose: transformers has a public setter but no getter."""
    implementation: str | None = getattr(config, f"_{kind}")
    return implementation


def mark_initialized(module: nn.Module) -> None:
    """Keep the weights of `module` when the mixture's `post_init` initialises those that no checkpoint filled."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def mark_adapters_loaded(model: PreTrainedModel, loaded: bool = True) -> None:
    """Tell `save_pretrained` whether `model` has PEFT adapters: only transformers' own `add_adapter` sets the flag."""
    model._hf_peft_config_loaded = loaded


def make_tokens_ordinary(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Make special tokens of a fast tokenizer ordinary ones: neither library can unmark a token once it is added."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for added in state["added_tokens"]:
        added["special"] = added["special"] and added["content"] not in tokens
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.extra_special_tokens = [token for token in tokenizer.extra_special_tokens if str(token) not in tokens]


class MixtureGenerationMixin(GenerationMixin):
    """`generate`, for a model whose members build their own masks and whose forward takes `weights`."""

    def decode_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """The output of `generate`'s loop, greedy or sampled; None leaves the loop to transformers."""
        return None

    def validate_generation_mode(self, mode: GenerationMode) -> None:
        """Raise `ValueError` if `generate` may not run in this mode."""

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """Let the mixture decode: a `custom_generate` would not see the streamer, nor be able to decline."""
        output = self.decode_tokens(*args, **kwargs)
        return super()._sample(*args, **kwargs) if output is None else output

    def _validate_generation_mode(self, generation_mode: GenerationMode, *args: Any) -> None:
        """Only here is the mode known before the first pass."""
        super()._validate_generation_mode(generation_mode, *args)
        self.validate_generation_mode(generation_mode)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """A cache of a fixed length must hold the longest of the members' prompts: `generate` knows one."""
        prompts = model_kwargs.get("member_prompts")
        if prompts is not None and prompts.prompt_width is not None:
            max_cache_length += max(prompts.width - prompts.prompt_width, 0)
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, mode, batch_size, max_cache_length
        )

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Drop `weights`, which `generate` would pass on to the assistant of assisted decoding."""
        model_kwargs = {key: value for key, value in model_kwargs.items() if key != "weights"}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Return the 2D mask unchanged: a 4D mask of the mixture would not fit each member's layers."""
        return attention_mask


def saved_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's weights by the names that `save_pretrained` gives them within a mixture; of tied ones, the first.

    transformers renames and divides the weights of some architectures on loading, and `save_pretrained` reverts what
    loading that checkpoint did; a mixture reverts what its architecture needs, as for a model that was not loaded.
    """
    model._weight_conversions = None
    state = model.state_dict()
    first = {(weight.data_ptr(), weight.shape): name for name, weight in reversed(state.items())}
    untied = {name: state[name] for name in first.values()}
    saved: dict[str, Tensor] = revert_weight_conversion(model, untied)
    return saved
