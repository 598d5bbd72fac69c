"""The mixture as a Hugging Face causal language model.

Shape legend: K members, B batch, T time, V vocabulary.

`LogitMixForCausalLM` holds the policy and its frozen anchors as submodules (`policy`, `anchor_0`, …), runs them on
the same tokens and returns the mixture's logits. Members that are adapters on one base share the policy's submodule.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.utils import can_return_tuple

from logitmix.mixture.adapters import ADAPTER_WEIGHTS, Adapters, adapter_config_from_dict, add_adapter
from logitmix.mixture.configuration import NO_ADAPTER, Alpha, LogitMixConfig, resolve_weights
from logitmix.mixture.decoding.loop import Decoding, DecodingRequest, current_request, decode, requested_decoding
from logitmix.mixture.decoding.prompts import MODES_WITH_MEMBER_PROMPTS, with_member_prompts
from logitmix.mixture.dtypes import dtypes_of, with_member_dtypes
from logitmix.mixture.export import export_member
from logitmix.mixture.frozen.loading import load_with_references
from logitmix.mixture.frozen.references import read_references
from logitmix.mixture.frozen.sources import frozen_sources
from logitmix.mixture.loading import Member, load_members, load_tokenizer, validate_can_be_loaded
from logitmix.mixture.member_prompts import MemberPrompts, Prompts, validate_prompts_end_together
from logitmix.mixture.mixing import Scheme, Weights, mix_logits, weights_to_alpha
from logitmix.mixture.opening import validate_loaded
from logitmix.mixture.outputs import MixtureOutput, concatenate_outputs
from logitmix.mixture.quantization import open_quantized
from logitmix.mixture.scoring import ScoringMixture, num_labelled
from logitmix.mixture.tokenizers import declared_ends
from logitmix.mixture.torch_patches import avoid_weight_copies
from logitmix.mixture.transformers_patches import MixtureGenerationMixin, get_implementation


class LogitMixForCausalLM(ScoringMixture, MixtureGenerationMixin):
    """A policy and K - 1 frozen anchors, mixed in the logits: `z_mix = sum_k w_k z_k` (arXiv 2605.20555, eq. 1).

    Build one with `LogitMixForCausalLM.from_members`; save and load it like any model of transformers. The policy
    is an ordinary model, `model.policy`: `model.policy.save_pretrained(folder)` exports it alone.

    `forward` and `generate` take `alpha` (K = 2) or `weights`, for the batch or for each sequence, and default to the
    weights of the configuration. A member whose weight is 0 for every sequence does not run.

    Example:

        model = LogitMixForCausalLM.from_members("base", "sft", alpha=0.5)
        model.generate(**tokenizer(["2+2="], return_tensors="pt"), max_new_tokens=8, alpha=0.3)
    """

    config_class = LogitMixConfig
    config: LogitMixConfig
    # Not the policy's: code that uses a backbone and an output embedding (TRL's fused LM head) would silently score
    # the policy alone, while `generate` samples from the mixture.
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def __init__(self, config: LogitMixConfig, members: Sequence[nn.Module] | None = None) -> None:
        super().__init__(config)
        if members is None:
            members = [
                AutoModelForCausalLM.from_config(
                    member_config,
                    dtype=config.dtype_of(config.model_of(name)),
                    attn_implementation=get_implementation(member_config, "attn_implementation"),
                )
                if config.model_of(name) not in config.quantized_models
                else nn.Identity()  # in its place, until `from_pretrained` has opened it
                for name, member_config in zip(config.members, config.member_configs, strict=True)
            ]
            for name, adapter in config.adapters.items():
                if adapter != NO_ADAPTER and isinstance(members[0], PreTrainedModel):
                    add_adapter(members[0], name, adapter_config_from_dict(adapter))
        for name, member in zip(config.members, members, strict=True):
            if name in config.model_names:
                self.add_module(name, member)
                if isinstance(member, PreTrainedModel):
                    setattr(config, name, member.config)
                    avoid_weight_copies(member)
        self.adapters = Adapters(self.policy, config.members) if config.adapters else None
        self._keep_in_fp32_modules_strict = set(ADAPTER_WEIGHTS if config.adapters else [])
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.sources: dict[str, str] = {}
        self._cache_layers = config.cache_layers  # read at every decoded token, slow to compute
        self.post_init()
        self._freeze_anchors()

    @classmethod
    def from_members(
        cls,
        policy: Member,
        anchors: Member | Sequence[Member],
        alpha: float | None = None,
        weights: Sequence[float] | None = None,
        scheme: Scheme = "logit",
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> "LogitMixForCausalLM":
        """Build the mixture of `policy` and `anchors`.

        Args:
            policy: a model, or the folder or hub id of a model or of a LoRA adapter.
            anchors: one or several of the same kinds. One that is the same model object as the policy shares its
                weights: the two differ in their prompts alone (`member_prompts`), and train together.
            alpha: weight of the anchor (one anchor only); 0 is the policy alone. Default 0.5, as in the paper.
            weights: one weight per member, the policy's first; replaces `alpha`.
            scheme: `"logit"` or `"prob"`.
            peft_config: add a new LoRA adapter to the policy; only this adapter trains. If the policy has an adapter,
                new or loaded, an anchor that is an adapter on the same base, or that base itself, shares the policy's
                weights. Any other anchor is loaded as a separate model.
            kwargs: passed to `AutoModelForCausalLM.from_pretrained` for folders and hub ids (`dtype=`, …). By default
                each member has its checkpoint's dtype; `dtype={"policy": "float32", "anchor_0": "bfloat16"}` sets them
                apart.

        Members given as folders or hub ids must share one tokenizer, which the mixture keeps and saves. A completion
        of the mixture ends at any token with which one of them ends its own.

        Raises `ValueError` for a member that does not exist, tokenizers that differ, weights or adapters that do not
        fit, or an anchor's adapter that does not change the base's logits.
        """
        sources = [policy, *(anchors if isinstance(anchors, (list, tuple)) else [anchors])]
        if len(sources) < 2:
            raise ValueError("a mixture needs at least one anchor, got none")
        resolved = resolve_weights(alpha, weights, len(sources), scheme)
        members, adapters, tokenizer, ends = load_members(sources, peft_config, **kwargs)
        config = LogitMixConfig.from_member_configs(
            [member.config for member in members], resolved, scheme, adapters,
            dtype=members[0].dtype, member_dtypes=dtypes_of(members),
        )  # fmt: skip
        validate_can_be_loaded(config)
        model = cls(config, members)
        model.tokenizer = tokenizer
        model.sources = frozen_sources(config, sources)
        if members[0].generation_config is not None:
            model.generation_config = copy.deepcopy(members[0].generation_config)
            if ends != declared_ends(members[0]):
                model.generation_config.eos_token_id = ends
        return model.train(members[0].training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. The anchors are frozen, and the tokenizer of a local checkpoint is kept.

        `alpha=` replaces the checkpoint's weights. Each member has the dtype that it was saved in; `dtype=` is for all
        members, or for each by its name. Raises `ValueError` where the checkpoint lacks weights, unless
        `output_loading_info=True` asks for the list of them; and where it refers to frozen weights that are missing
        or have changed.
        """
        alpha, asks_for_info = kwargs.pop("alpha", None), kwargs.pop("output_loading_info", False)
        folder = pretrained_model_name_or_path
        load = super().from_pretrained
        kwargs = with_member_dtypes(folder, kwargs)
        local = None if folder is None else Path(folder, kwargs.get("subfolder") or "")
        references = read_references(local) if local is not None and local.is_dir() else None
        if local is not None and references is not None:
            model, info = load_with_references(load, local, references, *args, **kwargs)
        else:
            model, info = load(folder, *args, output_loading_info=True, **kwargs)
            model.attach(open_quantized(model.config, folder, **kwargs))
        if not asks_for_info:
            validate_loaded(info, str(folder))
        model._freeze_anchors()
        if alpha is not None:
            model.alpha = alpha
        if folder is not None and os.path.isdir(folder):
            model.tokenizer = load_tokenizer(str(folder))
        return (model, info) if asks_for_info else model

    # --- the weights ------------------------------------------------------------------------------------------

    @property
    def alpha(self) -> float:
        """The anchor's weight in the configuration (K = 2, weights that sum to 1)."""
        weights = self.config.weights
        if len(weights) != 2:
            raise ValueError(f"alpha needs 2 members, the mixture has {len(weights)}; use config.weights")
        alpha = weights_to_alpha(weights)
        if alpha is None:
            raise ValueError(f"no alpha gives the weights {weights}, which do not sum to 1; use config.weights")
        return alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self.config.set_weights(self._resolve_weights(alpha, None))

    def export_member(self, name: str, folder: str | os.PathLike[str], merge: bool = False) -> None:
        """Save one member alone; see `logitmix.mixture.export.export_member`."""
        export_member(self, name, folder, merge)

    # --- forward ----------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        alpha: Alpha | None = None,
        weights: Weights | None = None,
        member_prompts: MemberPrompts | Mapping[str, Prompts] | None = None,
        **kwargs: Any,
    ) -> MixtureOutput:
        """The mixture's logits `[B, T, V]` in float32, in the usual output of a causal language model.

        `alpha` is a number or `[B]`; `weights` are `[K]` or `[B, K]`. `hidden_states` and `attentions`, if requested,
        are the members' tuples, concatenated.

        A member in `member_prompts` (see `generate`) reads that prompt instead of the prompt in `input_ids`. The last
        `logits_to_keep - 1` tokens of `input_ids` follow both prompts, and the logits `[B, logits_to_keep, V]` are
        those of the token after the prompt and after each of them. By default these are the tokens from the first
        label of the batch on, without `labels` none.
        """
        weights = self._resolve_weights(alpha, weights)
        if labels is None and member_prompts is None:
            self.config.require_one_prompt("forward without labels")
        prompts = self._member_prompts(member_prompts, input_ids)
        if prompts is not None and labels is not None:
            validate_prompts_end_together(labels != -100, attention_mask)
            logits_to_keep = logits_to_keep or num_labelled(labels) + 1
            labels = labels[:, -logits_to_keep:]
        logits, weights, past_key_values, outputs = self.run_members(
            weights, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            logits_to_keep, member_prompts=prompts, **kwargs,
        )  # fmt: skip
        mixed = mix_logits(logits, weights, self.config.scheme, self.config.cut)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=mixed, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MixtureOutput(
            loss=loss,
            logits=mixed,
            past_key_values=past_key_values,
            hidden_states=concatenate_outputs(outputs, "hidden_states"),
            attentions=concatenate_outputs(outputs, "attentions"),
        )

    # --- generation -------------------------------------------------------------------------------------------

    def generate(
        self,
        *args: Any,
        alpha: Alpha | None = None,
        weights: Weights | None = None,
        decoding: Decoding = "joint",
        output_member_logprobs: bool = False,
        member_prompts: Mapping[str, Prompts] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate`, sampling each token from the mixture (eq. 3) at `alpha` or `weights`.

        Args:
            decoding: `"joint"` runs all members for each token; `"alternating"` draws from the same distribution in
                fewer passes (`mixture/decoding/alternating.py`), for two members with a model each; `"auto"` chooses
                the cheaper at every step (`pass_costs.py`), and joint decoding where the other is not possible.
                Greedy completions are equal but for ties of rounding; samples differ at the same seed.
            output_member_logprobs: with `return_dict_in_generate`, also return each member's log-probability of every
                token (`MixtureGenerateOutput`).
            member_prompts: what members read instead of `input_ids`, by their names (`"anchor"` if there is one):
                texts, token ids, or what a tokenizer returns, one for each sequence or one for all. The tokens that
                follow are shared. Texts are read by `tokenizer=`, or the mixture's own. The sequences that are
                returned begin with `input_ids`; without them, with the policy's prompt. For joint decoding. Default:
                `config.member_prompts`.

        Raises `ValueError` if what is requested cannot be done, with the argument that stands against it.
        """
        resolved = self._resolve_weights(alpha, weights)
        if alpha is not None or weights is not None:
            # `generate` repeats tensors, but not lists, along with beams and returned sequences: weights of each
            # sequence must be repeated, weights of the batch must not
            kwargs["weights"] = resolved if resolved.dim() == 2 else resolved.tolist()
        member_prompts = self.config.member_prompts if member_prompts is None else member_prompts
        if member_prompts != {}:
            args, kwargs = with_member_prompts(self, member_prompts, args, kwargs)
        with requested_decoding(DecodingRequest(decoding, output_member_logprobs, "member_prompts" in kwargs)):
            return super().generate(*args, **kwargs)

    def decode_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """The loop of `generate`, as requested there."""
        return decode(self, *args, **kwargs)

    def validate_generation_mode(self, mode: GenerationMode) -> None:
        """Raise `ValueError` for a mode, such as beam search, that `generate` was requested not to use."""
        request = current_request()
        if request.has_member_prompts and mode not in MODES_WITH_MEMBER_PROMPTS:
            raise ValueError(f"member_prompts cannot be used with the generation mode {mode.value!r}")
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            request.refuse(f"the generation mode {mode.value!r}")


AutoConfig.register(LogitMixConfig.model_type, LogitMixConfig)
AutoModelForCausalLM.register(LogitMixConfig, LogitMixForCausalLM)
