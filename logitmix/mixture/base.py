"""How a mixture holds and runs its members.

Shape legend: K members, B batch, T time, V vocabulary, D width of the hidden states.

Each member is a submodule, or the policy's submodule with an adapter of its own. One KV cache serves all members: each
sees its own range of layers. Members run through their own forward, so whatever an architecture does to its logits
(soft caps, scaling, biases) happens before they are mixed. Only members that share one linear head mix their hidden
states instead.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from logitmix.mixture.adapters import Adapters, adapter_layers, adapter_parameters
from logitmix.mixture.cache import member_caches, validate_cached_tokens
from logitmix.mixture.configuration import NO_ADAPTER, Alpha, LogitMixConfig, resolve_weights
from logitmix.mixture.dtypes import dtypes_of
from logitmix.mixture.folding import passes, run_together
from logitmix.mixture.frozen.references import REFERENCES
from logitmix.mixture.head import HeadTransform, infer_head_transform
from logitmix.mixture.member_prompts import MemberPrompts, PassInputs, Prompts
from logitmix.mixture.mixing import Weights, mix_logits
from logitmix.mixture.prefill import repeated_prefill
from logitmix.mixture.quantization import num_bytes, save_quantized
from logitmix.mixture.sharding import are_sharded


class MixtureBase(PreTrainedModel):
    """A model of a trainable policy and frozen anchors: whatever differs from a single model except its forward.

    Its submodules are named by `config.model_names`, the policy first. An anchor without a submodule shares the
    policy's: it is that model with another adapter, or with none.
    """

    config: LogitMixConfig
    policy: PreTrainedModel
    adapters: Adapters | None
    _cache_layers: list[int]
    _head_transform: HeadTransform | None = None  # of the policy's head, if linear; inferred on first use
    _head_transform_is_known = False
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

    # --- running the members ----------------------------------------------------------------------------------

    def run_members(
        self,
        weights: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mix_before_head: bool = True,
        policy_kwargs: dict[str, Any] | None = None,
        member_prompts: MemberPrompts | None = None,
        **kwargs: Any,
    ) -> tuple[list[Tensor], Tensor, Cache | None, list[Any]]:
        """Run the members; return the arguments of `mix_logits`, the cache, and the outputs of the members that ran.

        The logits are those of each member over the shared vocabulary; a member of weight 0, which `mix_logits`
        ignores, does not run and is represented by the first active one's. With `mix_before_head`, members that share
        a linear head instead give the mixture's own logits, with weight 1. `policy_kwargs` go to the policy alone.
        With `member_prompts`, the logits are those of the tokens that the members share.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("a mixture takes input_ids, not inputs_embeds: its members have different embeddings")
        if weights.dim() == 2 and len(weights) != len(input_ids):
            raise ValueError(f"weights have {len(weights)} rows for a batch of {len(input_ids)} sequences")
        sharded = are_sharded((self, *self.members))
        is_active = _is_active(weights, sharded)
        active = [name for name, runs in zip(self.config.members, is_active, strict=True) if runs]

        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training and self.policy.is_gradient_checkpointing:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        caches = dict(zip(self.config.members, member_caches(past_key_values, self._cache_layers), strict=True))
        inputs = dict.fromkeys(active, PassInputs(input_ids, attention_mask, position_ids))
        if member_prompts is not None:
            views = {name: caches[name] for name in active}
            cached = {name: 0 if view is None else int(view.get_seq_length()) for name, view in views.items()}
            inputs, logits_to_keep = member_prompts.inputs(
                active, input_ids, attention_mask, position_ids, cached, logits_to_keep
            )
        arguments = kwargs | (policy_kwargs or {}) | {"returns_states": self._returns_states()}
        groups, inputs = passes(self.config, inputs, member_prompts, past_key_values, arguments, not sharded)
        if past_key_values is not None and not torch.compiler.is_compiling():
            validate_cached_tokens({name: caches[name] for name in active}, inputs)

        prompts = None
        if not self._returns_states():
            prompts = repeated_prefill(list(inputs.values()), past_key_values, logits_to_keep, kwargs)
        if prompts is not None:
            inputs = {name: prompts.select_inputs(each) for name, each in inputs.items()}
        settings = {"use_cache": use_cache, "return_dict": True} | kwargs
        head_transform = self._shared_linear_head(active) if mix_before_head else None
        if head_transform is None:
            settings["logits_to_keep"] = logits_to_keep
        outputs = self._run_passes(groups, inputs, caches, settings, policy_kwargs or {}, head_transform is not None)
        rows = slice(None) if prompts is None else prompts.prompt_B
        if prompts is not None and past_key_values is not None:
            past_key_values.batch_select_indices(prompts.prompt_B)
        if head_transform is not None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden = [outputs[name].last_hidden_state[:, kept][rows] for name in active]
            mixed = self._mix_before_head(hidden, weights[..., torch.tensor(is_active)], head_transform)
            return [mixed[..., : self.config.vocab_size]], torch.ones(1), past_key_values, list(outputs.values())
        # again, because the forward of some members (Whisper's) ignores logits_to_keep
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else slice(None)
        by_name = {n: output.logits[:, kept, : self.config.vocab_size][rows] for n, output in outputs.items()}
        logits = [by_name.get(name, by_name[active[0]]) for name in self.config.members]
        return logits, weights, past_key_values, list(outputs.values())

    def _run_passes(
        self,
        groups: Sequence[Sequence[str]],
        inputs: Mapping[str, PassInputs],
        caches: Mapping[str, Cache | None],
        settings: Mapping[str, Any],
        policy_kwargs: Mapping[str, Any],
        up_to_head: bool,
    ) -> dict[str, Any]:
        """The output of each member, those of a group from one pass; `up_to_head` leaves out the output embedding."""
        outputs: dict[str, Any] = {}
        for name, *others in groups:
            own = {**settings, **(policy_kwargs if name == "policy" else {})}
            with self.as_member(name) as model, torch.set_grad_enabled(torch.is_grad_enabled() and name == "policy"):
                run = model.get_decoder() if up_to_head else model
                if others:
                    group = [name, *others]
                    read, written = [inputs[each] for each in group], [caches[each] for each in group]
                    outputs |= zip(group, run_together(run, read, written, own), strict=True)
                else:
                    outputs[name] = run(**vars(inputs[name]), past_key_values=caches[name], **own)
        return outputs

    def _returns_states(self) -> bool:
        """Whether the members return hidden states or attentions without being asked."""
        configs = [member.config for member in self.members]
        return any(config.output_hidden_states or config.output_attentions for config in configs)

    def _shared_linear_head(self, active: Sequence[str]) -> HeadTransform | None:
        """The transform of the head that all active members share; None if they do not, or it is not linear."""
        is_shared = len(active) > 1 and {self.config.model_of(name) for name in active} == {"policy"}
        if not is_shared or self.config.scheme != "logit" or self.config.plausibility is not None:
            return None
        if torch.is_grad_enabled() and self.config.anchors_that_are_the_policy:
            return None  # the head trains, on the policy's states alone
        if not self._head_transform_is_known and not torch.compiler.is_compiling():
            self._head_transform_is_known = True
            try:
                transform = infer_head_transform(self.policy)
                self._head_transform = transform if transform.softcap is None else None
            except ValueError:  # for example a head with adapters, which then differs between members
                self._head_transform = None
        return self._head_transform

    def _mix_before_head(self, hidden_KBTD: Sequence[Tensor], weights: Tensor, transform: HeadTransform) -> Tensor:
        """The mixture's logits `[B, T, V]`: `sum_k w_k (W h_k + b) = W (sum_k w_k h_k) + (sum_k w_k) b`."""
        head = self.policy.get_output_embeddings()
        hidden_BTD = mix_logits(hidden_KBTD, weights).to(hidden_KBTD[0].dtype)
        logits_BTV = head(hidden_BTD)
        if getattr(head, "bias", None) is not None:
            excess = (weights.sum(-1) - 1).to(logits_BTV)
            logits_BTV = logits_BTV + excess.view(-1, 1, 1) * head.bias
        return logits_BTV if transform.scale == 1 else logits_BTV * transform.scale


def _is_active(weights: Tensor, sharded: bool) -> list[bool]:
    """Whether each member runs: its weight is not 0 for every sequence. If all are 0, the policy gives the shape.

    With sharded weights all run at weights of each sequence, which are others in other processes.
    """
    if sharded and weights.dim() == 2:
        return [True] * weights.shape[1]
    is_active: list[bool] = (weights.reshape(-1, weights.shape[-1]) != 0).any(0).tolist()
    return is_active if any(is_active) else [True, *is_active[1:]]
