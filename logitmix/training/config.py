"""The options of a training run, and the model that they are for."""

from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig
from transformers import PreTrainedModel
from trl import GRPOConfig

from logitmix.mixture.adapters import read_adapter_config, validate_adapter_targets
from logitmix.mixture.loading import load_member
from logitmix.mixture.mixing import Scheme
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.alpha.controllers import Controller

GROUP_LOSS = "group"
LossHead = Literal["fused", "reference"]
StatesOfAnchors = Literal["keep", "offload", "recompute"]
DynamicSampling = Literal["off", "filter", "refill"]


@dataclass
class LogitMixGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` and what a mixture adds to it.

    Args:
        anchor: folder or hub id of the frozen anchor (the SFT model, in the paper). Without one, and with a model
            that is no mixture, this is TRL's GRPO.
        alpha: weight of the anchor, 0 <= alpha < 1; 0 is the policy alone. Default 0.5, or the mixture's own where
            the model is one.
        scheme: `"logit"` (the default) or `"prob"`; a mixture has its own.
        alpha_controller: how alpha goes on from `alpha`, generation by generation: `"fixed"` (Algorithm 1),
            `"adaptive"` (Algorithm 2, eq. 9), `"validation_weighted"` (the authors' later variant), `"linear"` or
            `"cosine"` to `alpha_end`, or `"piecewise"` through `alpha_points`.
        alpha_end: alpha at the end of the run.
        alpha_points: `STEP:ALPHA`, optimizer steps; alpha goes on straight lines from `alpha` at step 0.
        validation_size: questions that `"adaptive"` and `"validation_weighted"` ask after each generation.
        adaptive_offset: c_o of eq. 9, in questions: the net gain at which alpha is 0.5.
        adaptive_scale: c_d of eq. 9, in questions: the larger, the less alpha follows the gain.
        loss_type: `"group"` is eq. 6; TRL's own loss types can be chosen instead.
        stop_strings: texts that end a rollout, beside EOS; they stay in it.
        rollout_batch_size: rollouts sampled at a time on a device, where the KV cache of all of them does not fit.
        dynamic_sampling: what happens to questions whose rollouts all earn the same (DAPO, arXiv 2503.14476): `"off"`,
            as in the paper, they count in eq. 6's mean over questions; `"filter"`, they leave it; `"refill"`, further
            questions are sampled in their place.
        max_refills: how often a step may sample further questions.
        disable_dropout: as in TRL, but on by default: each scoring draws its dropout anew, so that eq. 5's ratio would
            differ from 1 where no weight has changed.
        kl_to: `"anchor"` says that the KL of `beta > 0` is to the frozen anchor, `beta · KL(mixture ‖ anchor)`; with a
            mixture it has to be said, since TRL's own reference is another model.
        loss_head: `"fused"` never holds the logits of all tokens; `"reference"` mixes the members' own logits, for
            members whose output head the fused one does not know.
        anchor_states: the anchors' last hidden states, where scoring has computed them: `"keep"` them for the updates,
            `"offload"` them to the host's memory until then, or `"recompute"` them. With `loss_head="fused"`.
    """

    anchor: str | None = field(default=None, metadata={"help": "Folder or hub id of the frozen anchor."})
    alpha: float | None = field(
        default=None, metadata={"help": "Weight of the anchor, default 0.5; 0 is the policy alone."}
    )
    scheme: Scheme | None = field(default=None, metadata={"help": "How the members mix, default logit."})
    alpha_controller: Controller = field(default="fixed", metadata={"help": "How alpha goes on over the run."})
    alpha_end: float | None = field(
        default=None, metadata={"help": "alpha at the end of the run, for the controllers linear and cosine."}
    )
    alpha_points: list[str] | None = field(
        default=None, metadata={"help": "STEP:ALPHA ..., for the controller piecewise; lines from --alpha at step 0."}
    )
    validation_size: int = field(
        default=100, metadata={"help": "Validation questions of the controllers adaptive and validation_weighted."}
    )
    adaptive_offset: float = field(
        default=25.0, metadata={"help": "c_o of eq. 9, in questions: the net gain at which alpha is 0.5."}
    )
    adaptive_scale: float = field(
        default=35.0, metadata={"help": "c_d of eq. 9, in questions: the larger, the less alpha follows the gain."}
    )
    loss_type: str = field(
        default=GROUP_LOSS,
        metadata={"help": "'group' normalises by the tokens of a question's rollouts (eq. 6); or one of TRL's."},
    )
    stop_strings: list[str] | None = field(
        default=None, metadata={"help": "Texts that end a rollout, beside EOS; they stay in it."}
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Rollouts sampled at a time on a device; default all of a generation step."}
    )
    dynamic_sampling: DynamicSampling = field(
        default="off",
        metadata={"help": "Questions without reward spread: 'off' keeps them, 'filter' drops, 'refill' replaces."},
    )
    max_refills: int = field(
        default=3, metadata={"help": "How often a step may sample further questions, with 'refill'."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Sample and score without dropout, or the ratio is not that of the updates."}
    )
    kl_to: Literal["anchor"] | None = field(
        default=None, metadata={"help": "'anchor': with a mixture, the model that the KL of --beta is to."}
    )
    loss_head: LossHead = field(
        default="fused",
        metadata={"help": "'fused' never holds the logits of all tokens; 'reference' mixes the members' own logits."},
    )
    anchor_states: StatesOfAnchors = field(
        default="keep",
        metadata={"help": "The anchors' hidden states: 'keep' from scoring, 'offload' to the host, or 'recompute'."},
    )


def build_model(
    model: PreTrainedModel | str, args: LogitMixGRPOConfig, peft_config: PeftConfig | None = None
) -> PreTrainedModel:
    """The model to train; `args.alpha` and `args.scheme` say afterwards what holds.

    A mixture has the adapter of `peft_config` already; any other model is left to TRL to adapt.
    """
    if args.alpha is not None and not 0 <= args.alpha < 1:
        raise ValueError(
            f"alpha is {args.alpha}; training needs 0 <= alpha < 1, since the policy's gradient has the factor "
            "1 - alpha"
        )
    # TRL's default: float32 weights, under bf16 autocast unless told otherwise
    init_kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
    if args.anchor is not None:
        if isinstance(model, LogitMixForCausalLM):
            raise ValueError(
                f"the model is a mixture with an anchor of its own, and anchor is {args.anchor!r} as well; "
                "give only one"
            )
        alpha, scheme = 0.5 if args.alpha is None else args.alpha, args.scheme or "logit"
        model = LogitMixForCausalLM.from_members(
            model, args.anchor, alpha=alpha, scheme=scheme, peft_config=peft_config, **init_kwargs
        )
    elif isinstance(model, str):
        if peft_config is not None and read_adapter_config(model) is not None:
            raise ValueError(
                f"the model {model!r} is an adapter already, and peft_config asks for a new one; merge it first, with "
                "logitmix export --merge"
            )
        model = load_member(model, **init_kwargs)
    elif isinstance(model, LogitMixForCausalLM) and peft_config is not None:
        raise ValueError(
            "the model is a mixture already; give its members' names and args.anchor with peft_config, or build it "
            "with LogitMixForCausalLM.from_members(…, peft_config=…)"
        )
    if not isinstance(model, LogitMixForCausalLM):
        if peft_config is not None:
            validate_adapter_targets(model, peft_config)
        if args.alpha is not None or args.scheme is not None:
            raise ValueError(
                f"alpha is {args.alpha} and scheme {args.scheme}, but there is no anchor to mix with; set anchor"
            )
        return model
    args.model_init_kwargs = None  # spent; TRL warns of them beside a model that is already built
    if args.scheme not in (None, model.config.scheme):
        raise ValueError(f"scheme is {args.scheme!r}, but the mixture was built with {model.config.scheme!r}")
    if args.alpha is not None:
        model.alpha = args.alpha
    args.scheme = model.config.scheme
    args.alpha = model.alpha if len(model.config.weights) == 2 else None
    return model
