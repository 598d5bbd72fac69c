"""The options of a training run, and the model they train."""

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from transformers import PreTrainedModel
from trl import GRPOConfig

from logitmix.mixture.adapters import read_adapter_config, validate_adapter_targets
from logitmix.mixture.decoding.loop import Decoding
from logitmix.mixture.dtypes import is_mixture
from logitmix.mixture.loading import load_base, load_member
from logitmix.mixture.mixing import Scheme
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.opening import open_adapter
from logitmix.training.alpha.controllers import Controller, validate_alpha
from logitmix.training.init_kwargs import explained_init_kwargs, member_dtypes, resolve_init_kwargs
from logitmix.training.resumable_config import ResumableConfig

GROUP_LOSS = "group"
LossHead = Literal["fused", "reference"]
AnchorStatesOption = Literal["keep", "offload", "recompute"]
DynamicSampling = Literal["off", "filter", "refill"]
SaveFrozen = Literal["once", "always", "never"]
TrainTarget = Literal["mixture", "policy"]
ReanchorTo = Literal["policy", "merged"]


@dataclass
class LogitMixGRPOConfig(ResumableConfig, GRPOConfig):
    """TRL's `GRPOConfig`, and the options of a mixture.

    Args:
        anchor: folder or hub id of the frozen anchor (in the paper, the SFT model). Without one, and with a model
            that is not a mixture, training is TRL's GRPO with `loss_type` below.
        alpha: weight of the anchor, 0 <= alpha < 1; 0 is the policy alone. Default 0.5, or the weight of the mixture
            that is given as the model.
        anchor_dtype: dtype of the anchor's weights. Default its checkpoint's own; the policy's if that has fewer bits,
            or if the anchor is an adapter.
        anchor_quantization: hold the anchor's linear layers in fewer bits: `"int8"` or `"int4"` (torchao),
            `"bitsandbytes-8bit"` or `"bitsandbytes-4bit"`, or a `quantization_config` of transformers as a dict or
            JSON. A checkpoint that is quantised already needs none.
        scheme: `"logit"` (default) or `"prob"`; a mixture that is given as the model has its own.
        alpha_controller: schedule of alpha over the outer steps, from `alpha`: `"fixed"` (Algorithm 1), `"adaptive"`
            (Algorithm 2, eq. 9), `"validation_weighted"` (the authors' later variant), `"linear"` or `"cosine"` to
            `alpha_end`, `"piecewise"` through `alpha_points`, or `"kl_budget"`.
        alpha_end: alpha at the end of the run.
        alpha_points: `STEP:ALPHA` in updates; alpha is linear between the points, from `alpha` at step 0.
        kl_budget: `"kl_budget"` sets alpha after each outer step to the smallest at which KL(mixture ‖ anchor), in
            nats a token of the rollouts, is within the budget; at most 0.95.
        validation_size: questions that `"adaptive"` and `"validation_weighted"` decode after each outer step.
        adaptive_offset: c_o of eq. 9, in questions: the net gain at which alpha is 0.5.
        adaptive_scale: c_d of eq. 9, in questions: the larger, the less alpha follows the gain.
        loss_type: `"group"` is eq. 6; or one of TRL's loss types.
        stop_strings: texts that end a rollout, like EOS; they are kept in it.
        rollout_batch_size: rollouts to sample at a time on a device, if the KV cache of all of them does not fit.
        decoding: of rollouts and validation questions, as `LogitMixForCausalLM.generate` has it: `"joint"`,
            `"alternating"`, or `"auto"`, which chooses the cheaper at every step.
        dynamic_sampling: treatment of questions whose rollouts all earn the same reward (DAPO, arXiv 2503.14476):
            `"off"` keeps them in eq. 6's mean over questions, as in the paper; `"filter"` drops them from it;
            `"refill"` samples further questions in their place.
        max_refills: how many times an outer step may sample further questions.
        disable_dropout: as in TRL, but true by default: dropout differs between two scorings, so that eq. 5's ratio
            would differ from 1 before any update.
        kl_to: `"anchor"` makes the KL of `beta > 0` one to the frozen anchor, `beta · KL(mixture ‖ anchor)`. Required
            with a mixture, since TRL's own reference would be another model.
        loss_head: `"fused"` never holds the logits of all tokens; `"reference"` mixes the members' full logits, for
            members whose output head the fused one does not support.
        anchor_states: the anchors' last hidden states, once scoring has computed them: `"keep"` them for the updates,
            `"offload"` them to host memory until then, or `"recompute"` them. With `loss_head="fused"`.
        offload_anchor: keep the anchor in host memory while the policy is updated; it returns to sample and score.
            Its output head stays. On a CPU nothing moves.
        score_truncated: allow `top_k`, `top_p` and `min_p`, and score rollouts under the distribution that they leave:
            the mixture on the kept tokens, renormalised. All updates score a rollout on the tokens that were kept when
            it was sampled, so that the mean of the ratio is 1. For mixtures, with rollouts by `generate`.
        reanchor_steps: make the policy the anchor after every so many updates, a multiple of an outer step's.
            Checkpoints then hold the anchor, as with save_frozen `"always"`, or of adapters on one base its adapter.
        reanchor_to: what the anchor becomes: the `"policy"`, or the `"merged"` weights of both at the present alpha.
        train_target: whose log-probabilities the loss has. `"mixture"`: both sides of the ratio are of the mixture
            (eq. 6). `"policy"`: rollouts are sampled from the mixture, and the ratio is the policy alone over the
            mixture that sampled, an importance weight that is clipped, or truncated with `loss_type="cispo"`.
        save_frozen: where the weights that never train are saved: `"once"` in the run's folder, with checkpoints that
            refer to them and a whole model at the end; `"always"` in every checkpoint; or `"never"`: checkpoints and
            the model refer to the folders that the members were loaded from. Sharded runs, and those that push
            checkpoints to the hub, save them always.
        resume_without_optimizer: see `ResumableConfig`.

    A list-valued option may be given as its one element. Raises `ValueError` for a value of another type.
    """

    anchor: str | None = field(default=None, metadata={"help": "Folder or hub id of the frozen anchor."})
    alpha: float | None = field(
        default=None, metadata={"help": "Weight of the anchor; default 0.5, 0 is the policy alone."}
    )
    anchor_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={"help": "Dtype of the anchor; default its checkpoint's, but no wider than the policy's."},
    )
    anchor_quantization: dict | str | None = field(
        default=None,
        metadata={
            "help": "Hold the anchor in fewer bits: int8, int4, bitsandbytes-8bit, bitsandbytes-4bit, or a "
            "quantization_config of transformers as JSON."
        },
    )
    scheme: Scheme | None = field(default=None, metadata={"help": "How to mix the members; default logit."})
    alpha_controller: Controller = field(default="fixed", metadata={"help": "Schedule of alpha over the run."})
    alpha_end: float | None = field(
        default=None, metadata={"help": "alpha at the end of the run; for the controllers linear and cosine."}
    )
    alpha_points: list[str] | None = field(
        default=None,
        metadata={"help": "STEP:ALPHA ...; for the controller piecewise, linear between points."},
    )
    kl_budget: float | None = field(
        default=None,
        metadata={"help": "KL to the anchor in nats a token, which alpha keeps; for the controller kl_budget."},
    )
    validation_size: int = field(
        default=100, metadata={"help": "Validation questions; for the controllers adaptive and validation_weighted."}
    )
    adaptive_offset: float = field(
        default=25.0, metadata={"help": "c_o of eq. 9, in questions: the net gain at which alpha is 0.5."}
    )
    adaptive_scale: float = field(
        default=35.0, metadata={"help": "c_d of eq. 9, in questions: the larger, the less alpha follows the gain."}
    )
    loss_type: str = field(
        default=GROUP_LOSS,
        metadata={"help": "'group' normalises by the tokens of each question's rollouts (eq. 6); or one of TRL's."},
    )
    stop_strings: list[str] | None = field(
        default=None, metadata={"help": "Texts that end a rollout, like EOS; they are kept in it."}
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Rollouts to sample at a time on a device; default all of an outer step."}
    )
    decoding: Decoding = field(
        default="auto",
        metadata={
            "help": "Of a mixture: 'joint' runs all members for each token, 'alternating' draws from the same "
            "distribution in fewer passes, 'auto' chooses the cheaper at every step."
        },
    )
    dynamic_sampling: DynamicSampling = field(
        default="off",
        metadata={
            "help": "Questions with equal rewards for all rollouts: 'off' keeps, 'filter' drops, 'refill' replaces."
        },
    )
    max_refills: int = field(default=3, metadata={"help": "How many times 'refill' may sample further questions."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Sample and score without dropout, so that the ratio is 1 before an update."}
    )
    kl_to: Literal["anchor"] | None = field(
        default=None, metadata={"help": "'anchor': take the KL of --beta to the anchor; required with a mixture."}
    )
    loss_head: LossHead = field(
        default="fused",
        metadata={"help": "'fused' never holds the logits of all tokens; 'reference' mixes the members' full logits."},
    )
    anchor_states: AnchorStatesOption = field(
        default="keep",
        metadata={"help": "The anchors' hidden states: 'keep' from scoring, 'offload' to the host, or 'recompute'."},
    )
    offload_anchor: bool = field(
        default=False, metadata={"help": "Keep the anchor in host memory while the policy is updated."}
    )
    save_frozen: SaveFrozen = field(
        default="once",
        metadata={"help": "Save frozen weights 'once' in a run, 'always' in each checkpoint, or 'never'."},
    )
    train_target: TrainTarget = field(
        default="mixture",
        metadata={
            "help": "Train the 'mixture', or the 'policy' alone on rollouts of the mixture, by importance weights."
        },
    )
    reanchor_steps: int | None = field(
        default=None, metadata={"help": "Make the policy the anchor after every so many updates; default: never."}
    )
    reanchor_to: ReanchorTo = field(
        default="policy",
        metadata={"help": "What the anchor becomes: the 'policy', or the 'merged' weights of both at alpha."},
    )
    score_truncated: bool = field(
        default=False,
        metadata={"help": "Sample with top_k, top_p or min_p, and score the distribution that they leave."},
    )


def updates_per_outer_step(args: LogitMixGRPOConfig) -> int:
    """The number of updates in an outer step."""
    return args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps


def build_model(
    model: PreTrainedModel | str, args: LogitMixGRPOConfig, peft_config: PeftConfig | None = None
) -> PreTrainedModel:
    """The model to train. Afterwards `args.alpha` and `args.scheme` are those of the model.

    A mixture is returned with the adapter of `peft_config`; TRL adds it to any other model. A folder that is an
    adapter continues as that adapter: its weights train, and its base is frozen.

    Raises `ValueError` for options that contradict each other or the model.
    """
    validate_alpha(args.alpha)
    init_kwargs = resolve_init_kwargs(args, model)
    if args.anchor is not None:
        model = _mix_with_anchor(model, args, init_kwargs, peft_config)
    elif isinstance(model, str):
        model = _load(model, init_kwargs, peft_config)
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
    args.model_init_kwargs = None  # used; TRL warns if they accompany a loaded model
    if args.scheme not in (None, model.config.scheme):
        raise ValueError(f"scheme is {args.scheme!r}, but the mixture was built with {model.config.scheme!r}")
    if args.alpha is not None:
        model.alpha = args.alpha
    args.scheme = model.config.scheme
    args.alpha = model.alpha if len(model.config.weights) == 2 else None
    return model


def _mix_with_anchor(
    model: PreTrainedModel | str,
    args: LogitMixGRPOConfig,
    init_kwargs: dict[str, Any],
    peft_config: PeftConfig | None,
) -> LogitMixForCausalLM:
    """The mixture of the policy and `args.anchor`."""
    assert args.anchor is not None
    if isinstance(model, LogitMixForCausalLM):
        raise ValueError(
            f"the model is a mixture with an anchor of its own, and anchor is {args.anchor!r} as well; give only one"
        )
    with_anchor_dtype = init_kwargs | {"dtype": member_dtypes(args, init_kwargs["dtype"], model)}
    if args.anchor_quantization is not None:
        with_anchor_dtype["quantization_config"] = {"anchor_0": args.anchor_quantization}
    alpha, scheme = 0.5 if args.alpha is None else args.alpha, args.scheme or "logit"
    with explained_init_kwargs(init_kwargs):
        return LogitMixForCausalLM.from_members(
            model, args.anchor, alpha=alpha, scheme=scheme, peft_config=peft_config, **with_anchor_dtype
        )


def _load(source: str, init_kwargs: dict[str, Any], peft_config: PeftConfig | None) -> PreTrainedModel:
    """The model at a folder or hub id, or the adapter there on its base."""
    adapter = read_adapter_config(source)
    if peft_config is not None and adapter is not None:
        raise ValueError(
            f"the model {source!r} is an adapter already, and peft_config asks for a new one; merge it first, with "
            "logitmix export --merge"
        )
    if is_mixture(source) and init_kwargs["dtype"] == "float32":
        init_kwargs["dtype"] = {"policy": "float32"}  # the anchors keep theirs
    with explained_init_kwargs(init_kwargs):
        if adapter is None:
            return load_member(source, **init_kwargs)
        return open_adapter(load_base(adapter, source, **init_kwargs), source, is_trainable=True)
