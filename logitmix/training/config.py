"""The options of a training run, and what is refused of them before anything is sampled."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.import_utils import is_vllm_available

from logitmix.adapters import read_adapter_config
from logitmix.members import load_member
from logitmix.mixing import Scheme
from logitmix.modeling import LogitMixForCausalLM
from logitmix.training.alpha import Controller

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


def refuse_unsuitable_options(args: LogitMixGRPOConfig, model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    if is_peft_model(model) and isinstance(model.get_base_model(), LogitMixForCausalLM):
        raise ValueError(
            "the model is a mixture that PEFT has wrapped; TRL would not see it. Build it with "
            "LogitMixForCausalLM.from_members(…, peft_config=…) instead of get_peft_model"
        )
    if args.loss_type == GROUP_LOSS and args.beta != 0:
        raise ValueError(
            f"beta is {args.beta} with loss_type 'group', whose objective (eq. 6) has no KL term; "
            "set beta=0, or loss_type='grpo' for canonical GRPO with KL"
        )
    if args.stop_strings and args.mask_truncated_completions:
        raise ValueError(
            "mask_truncated_completions would mask every completion that a stop string ended, since TRL takes it for "
            "truncated; set it to False, or leave out stop_strings"
        )
    for name, choices in (("loss_head", get_args(LossHead)), ("anchor_states", get_args(StatesOfAnchors))):
        if getattr(args, name) not in choices:
            raise ValueError(f"{name} is {getattr(args, name)!r}; it must be one of {', '.join(map(repr, choices))}")
    if args.use_vllm and not is_vllm_available():
        raise ValueError("use_vllm is set, but vLLM is not installed: pip install vllm, or leave out use_vllm")
    refuse_unsuitable_sampling(args)
    refuse_unclear_kl(args, model)
    if not isinstance(model, LogitMixForCausalLM):
        return
    for option, reason in {
        "use_liger_kernel": "its fused loss reads one model's hidden states",
        "cast_lm_head_to_fp32": "a mixture has no single head; its logits are mixed in float32 anyway",
        "use_transformers_continuous_batching": "its paged cache does not know members",
        "sync_ref_model": "there is no reference model beside the anchor",
    }.items():
        if getattr(args, option):
            raise ValueError(f"{option}={getattr(args, option)!r} cannot be used with a mixture: {reason}")
    if model.config.weights[0] <= 0:
        raise ValueError(
            f"the policy's weight in the mixture is {model.config.weights[0]}; the gradient has it as a factor, so "
            "training needs it above 0"
        )


def refuse_unclear_kl(args: LogitMixGRPOConfig, model: PreTrainedModel) -> None:
    is_mixture = isinstance(model, LogitMixForCausalLM)
    if args.kl_to not in (None, "anchor"):
        raise ValueError(f"kl_to is {args.kl_to!r}; it must be 'anchor', or left out")
    if args.kl_to is not None and args.beta == 0:
        raise ValueError(f"kl_to is {args.kl_to!r}, but beta is 0 and there is no KL; set beta, or leave out kl_to")
    if args.kl_to is not None and not (is_mixture and len(model.members) == 2):
        raise ValueError(
            f"kl_to is {args.kl_to!r}, and the model has {len(model.members) - 1 if is_mixture else 'no'} anchors; it "
            "takes a mixture with one. Without an anchor the KL of beta is to a copy of the model at the start"
        )
    if is_mixture and args.beta != 0 and args.kl_to is None:
        raise ValueError(
            f"beta={args.beta} with a mixture does not say which anchor its KL is to: kl_to='anchor' is the frozen "
            "anchor; TRL's own reference, a copy of the model at the start, would be the mixture as it was then, and "
            "is not kept. Set kl_to='anchor', or beta=0 as in the paper, where the anchor already holds the policy"
        )


def refuse_unsuitable_sampling(args: LogitMixGRPOConfig) -> None:
    if args.dynamic_sampling not in get_args(DynamicSampling):
        raise ValueError(
            f"dynamic_sampling is {args.dynamic_sampling!r}; it must be one of "
            f"{', '.join(map(repr, get_args(DynamicSampling)))}"
        )
    if args.dynamic_sampling == "off":
        return
    if args.loss_type != GROUP_LOSS:
        raise ValueError(
            f"dynamic_sampling is {args.dynamic_sampling!r} with loss_type {args.loss_type!r}, which has no mean over "
            "questions that one could leave; set loss_type='group', or dynamic_sampling='off'"
        )
    if args.dynamic_sampling == "refill":
        if args.max_refills < 1:
            raise ValueError(f"max_refills is {args.max_refills}; it must be at least 1")
        if args.scale_rewards == "batch" or args.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "dynamic_sampling='refill' puts groups of several samplings together, whose advantages must not "
                "depend on the rest of their batch; set scale_rewards to 'group' or 'none', and "
                "multi_objective_aggregation to 'sum_then_normalize'"
            )


def require_questions(trainer: GRPOTrainer) -> None:
    """Raise `ValueError` where a generation step needs more questions than there are: no step would be taken."""
    if trainer.args.dynamic_sampling == "refill" and not isinstance(trainer.train_dataset, Dataset):
        raise ValueError(
            f"dynamic_sampling='refill' draws questions from anywhere in the data set, which a "
            f"{type(trainer.train_dataset).__name__} cannot give; use a Dataset, or 'filter'"
        )
    needed = trainer.args.generation_batch_size // trainer.num_generations
    if isinstance(trainer.train_dataset, Dataset) and len(trainer.train_dataset) < needed:
        raise ValueError(
            f"the data set has {len(trainer.train_dataset)} questions, fewer than the {needed} of a generation step "
            f"(generation_batch_size {trainer.args.generation_batch_size} / num_generations "
            f"{trainer.num_generations}); use smaller batches or more data"
        )


def require_prompts_fit(trainer: GRPOTrainer, dataset: Any, name: str = "prompt") -> None:
    """Raise `ValueError` before the first step where a prompt and its completion exceed the context."""
    context = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    if context is None or not isinstance(dataset, Dataset):
        return
    for start in range(0, len(dataset), 1000):
        prompts = dataset[start : start + 1000]["prompt"]
        for offset, ids in enumerate(trainer._tokenize_prompts(prompts)[0]):
            if len(ids) + trainer.max_completion_length > context:
                raise ValueError(
                    f"{name} {start + offset} has {len(ids)} tokens; with max_completion_length "
                    f"{trainer.max_completion_length} that exceeds the members' context of {context}. "
                    "Shorten or drop the prompt, or lower max_completion_length"
                )
