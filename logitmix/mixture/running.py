"""How a mixture runs its members.

Shape legend: K members, B batch, T time, V vocabulary, D width of the hidden states.

One KV cache serves all members: each sees its own range of layers. Members run through their own forward, so whatever
an architecture does to its logits (soft caps, scaling, biases) happens before they are mixed. Only members that share
one linear head mix their hidden states instead.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from logitmix.mixture.base import MixtureBase
from logitmix.mixture.cache import member_caches, validate_cached_tokens
from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.folding import passes, run_together
from logitmix.mixture.head import HeadTransform, infer_head_transform
from logitmix.mixture.member_prompts import MemberPrompts, PassInputs
from logitmix.mixture.mixing import mix_logits
from logitmix.mixture.prefill import DistinctPrompts, repeated_prefill
from logitmix.mixture.sharding import are_sharded


@dataclass(frozen=True)
class Passes:
    """The passes that give the logits of one call.

    Args:
        groups: the members of each pass.
        inputs: what each of them reads: of prompts that occur several times in a batch, one row.
        caches: each member's view of the KV cache.
        logits_to_keep: how many logits at the end, or which.
        prompts: which rows of the batch have which prompt, where some occur several times.
    """

    groups: Sequence[Sequence[str]]
    inputs: Mapping[str, PassInputs]
    caches: Mapping[str, Cache | None]
    logits_to_keep: int | Tensor
    prompts: DistinctPrompts | None

    def kept_hidden(self, hidden_BTD: Tensor) -> Tensor:
        """The hidden states whose logits are kept, for each sequence of the batch."""
        keep = self.logits_to_keep
        return self._expand(hidden_BTD[:, slice(-keep, None) if isinstance(keep, int) else keep])

    def kept_logits(self, logits_BTV: Tensor) -> Tensor:
        """The kept logits of a pass, for each sequence of the batch."""
        # again, because the forward of some members (Whisper's) ignores logits_to_keep
        keep = self.logits_to_keep
        return self._expand(logits_BTV[:, -keep:] if isinstance(keep, int) else logits_BTV)

    def _expand(self, states_BTX: Tensor) -> Tensor:
        return states_BTX if self.prompts is None else self.prompts.expand(states_BTX)


@contextmanager
def index_errors(config: LogitMixConfig, member: str) -> Iterator[None]:
    """Within the context, a token or position that the member has no embedding of is a `ValueError` of one sentence.

    Members without a table of positions read more tokens than their context, as in transformers.
    """
    try:
        yield
    except IndexError as error:
        if "index out of range in self" not in str(error):
            raise
        context = config.context_lengths[config.members.index(member)]
        raise ValueError(
            f"{member} has no embedding of a token or of its position: its vocabulary has {config.vocab_size} tokens, "
            f"and its context {context}; shorten the prompt, lower max_new_tokens, or correct the ids"
        ) from error


class RunningMixture(MixtureBase):
    """A mixture with the method that runs its members."""

    _head_transform: HeadTransform | None = None  # of the policy's head, if linear; inferred on first use
    _head_transform_is_known = False

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
        if input_ids.shape[-1] == 0:
            raise ValueError("input_ids have no tokens; a prompt needs at least one, such as BOS")
        if weights.dim() == 2 and len(weights) != len(input_ids):
            raise ValueError(f"weights have {len(weights)} rows for a batch of {len(input_ids)} sequences")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training and self.policy.is_gradient_checkpointing:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        sharded = are_sharded((self, *self.members))
        is_active = _is_active(weights, sharded)
        active = [name for name, runs in zip(self.config.members, is_active, strict=True) if runs]
        policy_kwargs = policy_kwargs or {}
        call = self._prepare(
            active, PassInputs(input_ids, attention_mask, position_ids), past_key_values, logits_to_keep,
            member_prompts, kwargs | policy_kwargs, not sharded,
        )  # fmt: skip
        head_transform = self._shared_linear_head(active) if mix_before_head else None
        settings = {"use_cache": use_cache, "return_dict": True} | kwargs
        outputs = self._run_passes(call, settings, policy_kwargs, head_transform is not None)
        if call.prompts is not None and past_key_values is not None:
            past_key_values.batch_select_indices(call.prompts.prompt_B)
        if head_transform is not None:
            hidden = [call.kept_hidden(outputs[name].last_hidden_state) for name in active]
            mixed = self._mix_before_head(hidden, weights[..., torch.tensor(is_active)], head_transform)
            return [mixed[..., : self.config.vocab_size]], torch.ones(1), past_key_values, list(outputs.values())
        V = self.config.vocab_size
        by_name = {name: call.kept_logits(output.logits)[..., :V] for name, output in outputs.items()}
        logits = [by_name.get(name, by_name[active[0]]) for name in self.config.members]
        return logits, weights, past_key_values, list(outputs.values())

    def _prepare(
        self,
        active: Sequence[str],
        read: PassInputs,
        cache: Cache | None,
        logits_to_keep: int | Tensor,
        member_prompts: MemberPrompts | None,
        arguments: Mapping[str, Any],
        may_fold: bool,
    ) -> Passes:
        """The passes of the active members; `arguments`, others of a pass, may ask for outputs of one or every row."""
        caches = dict(zip(self.config.members, member_caches(cache, self._cache_layers), strict=True))
        inputs = dict.fromkeys(active, read)
        if member_prompts is not None:
            views = {name: caches[name] for name in active}
            cached = {name: 0 if view is None else int(view.get_seq_length()) for name, view in views.items()}
            inputs, logits_to_keep = member_prompts.inputs(
                active, read.input_ids, read.attention_mask, read.position_ids, cached, logits_to_keep
            )
        arguments = {**arguments, "returns_states": self._returns_states()}
        groups, inputs = passes(self.config, inputs, member_prompts, cache, arguments, may_fold)
        if cache is not None and not torch.compiler.is_compiling():
            validate_cached_tokens({name: caches[name] for name in active}, inputs)
        prompts = repeated_prefill(list(inputs.values()), cache, logits_to_keep, arguments)
        if prompts is not None:
            inputs = {name: prompts.select_inputs(each) for name, each in inputs.items()}
        return Passes(groups, inputs, caches, logits_to_keep, prompts)

    def _run_passes(
        self, call: Passes, settings: Mapping[str, Any], policy_kwargs: Mapping[str, Any], up_to_head: bool
    ) -> dict[str, Any]:
        """The output of each member, those of a group from one pass; `up_to_head` leaves out the output embedding."""
        outputs: dict[str, Any] = {}
        for name, *others in call.groups:
            own = {**settings, **(policy_kwargs if name == "policy" else {})}
            if not up_to_head:
                own["logits_to_keep"] = call.logits_to_keep
            with (
                self.as_member(name) as model,
                torch.set_grad_enabled(torch.is_grad_enabled() and name == "policy"),
                index_errors(self.config, name),
            ):
                run = model.get_decoder() if up_to_head else model
                if others:
                    group = [name, *others]
                    read, written = [call.inputs[each] for each in group], [call.caches[each] for each in group]
                    outputs |= zip(group, run_together(run, read, written, own), strict=True)
                else:
                    outputs[name] = run(**vars(call.inputs[name]), past_key_values=call.caches[name], **own)
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
