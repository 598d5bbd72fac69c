"""`logitmix distill`: one ordinary model out of a mixture, trained to match it on samples of its own, or by SFT."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from logitmix.cli.options.data import TaskArguments
from logitmix.cli.options.described import described
from logitmix.cli.options.lora import AdapterArguments
from logitmix.cli.options.model import MixtureArguments, ModelArguments, find_model, load_model
from logitmix.cli.options.parser import flatten, parse
from logitmix.cli.options.validation import validate_at_least
from logitmix.runs.console import console

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from logitmix.mixture.modeling import LogitMixForCausalLM
    from logitmix.tasks import Problem, Task
    from logitmix.training.distillation import LogitMixDistillationConfig
else:  # the flags of the configuration, which takes seconds to import; the options hold the configuration itself
    LogitMixDistillationConfig = described("LogitMixDistillationConfig")

REPORT_FOLDER = "report"  # within the run's
BASE_FOLDER = "base"  # within the run's, for an adapter's base that has no folder of its own
SAMPLES_FOLDER = "samples"  # within the run's, for method sft
MEMBER_OR_MERGED = r"policy|anchor(_\d+)?|merged"

Method = Literal["on_policy", "sft"]


@dataclass
class StudentArguments:
    """Student and report"""

    student: str = field(
        default="policy",
        metadata={
            "help": "What the student starts from: policy, anchor (of several anchor_0, ...), merged for the average "
            "of their weights, or a folder or hub id with the mixture's tokenizer (of such a name: ./policy)."
        },
    )
    method: Method = field(
        default="on_policy",
        metadata={
            "help": "on_policy: the student samples, and matches the mixture's distribution at each token; sft: the "
            "mixture samples once, and the student is fine-tuned on the samples that the verifier finds right."
        },
    )
    samples_per_prompt: int = field(
        default=4, metadata={"help": "Method sft: completions of each prompt that the mixture samples."}
    )
    sample_batch_size: int = field(default=64, metadata={"help": "Method sft: completions sampled at a time."})
    report: bool = field(
        default=True,
        metadata={
            "help": "Compare student, mixture, members and merged weights on --eval_limit test problems afterwards, "
            "in the folder report of the run."
        },
    )
    report_batch_size: int = field(default=64, metadata={"help": "Responses decoded at a time for the report."})

    def __post_init__(self) -> None:
        if not re.fullmatch(MEMBER_OR_MERGED, self.student):
            self.student = find_model(self.student)
        validate_at_least(self, report_batch_size=1, samples_per_prompt=1, sample_batch_size=1)
        for name in ("samples_per_prompt", "sample_batch_size"):
            value = getattr(self, name)
            if self.method != "sft" and value != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name} is {value}, but method {self.method} samples for each update; add --method sft"
                )


@dataclass
class DistillOptions:
    task: TaskArguments
    model: ModelArguments
    mixture: MixtureArguments
    student: StudentArguments
    adapter: AdapterArguments
    training: LogitMixDistillationConfig


def parse_distill(argv: Sequence[str]) -> DistillOptions:
    description = "Train one model to match a mixture, on completions that it samples itself."
    return parse("distill", description, DistillOptions, argv, positional=("model_name_or_path", "MIXTURE"))


def main(argv: Sequence[str]) -> None:
    argv = list(argv)
    run(parse_distill(argv), ["logitmix", "distill", *argv])


def run(options: DistillOptions, command: Sequence[str]) -> None:
    """Distil, with `command` as the command line that is printed to continue the run when it is stopped."""
    from pathlib import Path

    from transformers import set_seed

    from logitmix.evaluation.complement import validate_enough_problems
    from logitmix.mixture.loading import require_tokenizer
    from logitmix.mixture.modeling import LogitMixForCausalLM
    from logitmix.mixture.tokenizers import prepare_for_task, validate_chat_template
    from logitmix.runs.folder import find_checkpoint
    from logitmix.runs.trackers import validate_trackers
    from logitmix.runs.training import run_training
    from logitmix.training.distillation_options import validate_distillation_options
    from logitmix.training.distillation_sft import sft_config
    from logitmix.training.students import build_student

    task_args, model_args, mixture_args, args = options.task, options.model, options.mixture, options.training
    source, start, method = model_args.model_name_or_path, options.student.student, options.student.method
    validate_trackers(args.report_to)
    if args.eval_strategy != "no":
        raise ValueError("TRL's eval_strategy evaluates by sampling; evaluate the student with logitmix eval instead")
    if method == "sft":  # refusals come before anything is loaded
        sft_config(args)
    else:
        validate_distillation_options(args, {})
    peft_config = options.adapter.peft_config
    arguments = {"command": "distill"}
    arguments |= flatten(task_args, model_args, mixture_args, options.student, options.adapter) | args.to_dict()
    checkpoint = find_checkpoint(args.output_dir, arguments, args.resume_from_checkpoint)

    task = task_args.load()
    task.chat_template_kwargs = args.chat_template_kwargs or {}
    mixture = load_model(model_args, mixture_args)
    if not isinstance(mixture, LogitMixForCausalLM):
        raise ValueError(
            f"{source} is a single model, and distill takes a mixture: give its anchor with --anchor; TRL's own "
            "DistillationTrainer distils a single model"
        )
    problems = task.problems("train", task_args.train_limit)
    test_problems = task.problems("test", task_args.eval_limit) if options.student.report else []
    if options.student.report:
        validate_enough_problems(len(test_problems))
    tokenizer = require_tokenizer(source, padding_side="left", truncation_side="left")
    base_folder = None if peft_config is None else str(Path(args.output_dir) / BASE_FOLDER)
    init_kwargs = model_args.init_kwargs | {"trust_remote_code": args.trust_remote_code}
    on_members = peft_config if leaves_members_as_they_are(args) else None
    if re.fullmatch(MEMBER_OR_MERGED, start) and Path(start).is_dir():
        console.print(f"The student starts from the mixture's {start}; for the folder, write ./{start}.")
    set_seed(args.seed)  # a new adapter starts at random
    student = build_student(mixture, start, base_folder, on_members, **init_kwargs)
    if task.template.chat:
        validate_chat_template(tokenizer)
    prepare_for_task(tokenizer, task, problems)
    args.disable_tqdm = True
    print_shared_memory(student, mixture, peft_config is not None)
    make = sft_trainer if method == "sft" else on_policy_trainer
    trainer, rows = make(student, mixture, tokenizer, task, problems, options)
    data = {"train": rows} | ({"test": test_problems} if test_problems else {})
    run_training(trainer, command, f"distill on {task.name}", arguments, checkpoint, data=data)
    console.print(f"The student is in {args.output_dir}.")
    if test_problems and args.world_size == 1:
        report(trainer.model.eval(), mixture, tokenizer, task, test_problems, options, trainer.state.global_step)
    elif test_problems and trainer.is_world_process_zero():
        console.print("Several processes write no report; compare the student with logitmix eval and complement.")


def leaves_members_as_they_are(args: LogitMixDistillationConfig) -> bool:
    """Whether an adapter can train on weights of the mixture: none of them is merged for vLLM, or sharded."""
    from logitmix.cli.options.memory_plan import launched_sharded

    return not (args.use_vllm or args.fsdp or args.deepspeed_plugin or launched_sharded())


def adapter_to_add(student: "PreTrainedModel", options: DistillOptions) -> "LoraConfig | None":
    """The configuration of the adapter that the trainer gives to the student, unless that has one, or trains whole."""
    from accelerate.utils import is_peft_model

    return None if is_peft_model(student) else options.adapter.peft_config


def print_shared_memory(student: "PreTrainedModel", mixture: "LogitMixForCausalLM", is_adapter: bool) -> None:
    """Print, of a student with an adapter, the weights that it shares with the mixture, or copies."""
    from logitmix.mixture.quantization import num_bytes
    from logitmix.training.student_adapters import shared_bytes

    if not is_adapter:
        return
    shared, own = shared_bytes(student, mixture), sum(map(num_bytes, student.parameters()))
    if shared:
        text = f"Student and mixture share {shared / 1e9:.3g} GB of weights, which are in memory once."
    else:
        text = f"The student has weights of its own, {own / 1e9:.3g} GB, and shares none with the mixture."
    console.print(text, soft_wrap=True)


def on_policy_trainer(
    student: "PreTrainedModel",
    mixture: "LogitMixForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    task: "Task",
    problems: "Sequence[Problem]",
    options: DistillOptions,
) -> tuple[Any, "Sequence[Any]"]:
    """The trainer of method `on_policy`, and what it trains on."""
    from logitmix.training.distillation import MixtureDistillationTrainer
    from logitmix.training.rewards import grpo_dataset

    args = options.training
    if args.stop_strings is None and task.template.stop:
        args.stop_strings = list(task.template.stop)
    trainer = MixtureDistillationTrainer(
        student,
        mixture,
        args,
        train_dataset=grpo_dataset(task, problems),
        processing_class=tokenizer,
        peft_config=adapter_to_add(student, options),
    )
    return trainer, problems


def sft_trainer(
    student: "PreTrainedModel",
    mixture: "LogitMixForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    task: "Task",
    problems: "Sequence[Problem]",
    options: DistillOptions,
) -> tuple[Any, "Sequence[Any]"]:
    """The trainer of method `sft`, and the rows it trains on, which the mixture samples here."""
    from pathlib import Path

    from accelerate import PartialState
    from transformers import set_seed

    from logitmix.evaluation.samples import right_rows, sample_mixture
    from logitmix.mixture.adapters import validate_adapter_targets
    from logitmix.mixture.generation import tokenize_prompts
    from logitmix.training.distillation_sft import sft_config, validate_sft_student
    from logitmix.training.sft import ResumableSFTTrainer, sft_dataset

    args, peft_config = options.training, adapter_to_add(student, options)
    if args.world_size > 1:
        raise ValueError(
            f"method sft samples in one process, and there are {args.world_size}; start it without torchrun or "
            "accelerate launch, or use --method on_policy"
        )
    assert args.max_completion_length is not None
    prompts = [task.prompt(problem) for problem in problems]
    prompt_ids = tokenize_prompts(tokenizer, prompts, task.chat_template_kwargs)
    validate_sft_student(student, mixture, prompt_ids, args.max_completion_length)
    if peft_config is not None:
        validate_adapter_targets(student, peft_config)
    settings = {"samples": options.student.samples_per_prompt, "max_new_tokens": args.max_completion_length}
    settings |= {"temperature": args.temperature, "seed": args.seed}
    kept_out = {"eval_limit"}  # of the report
    arguments = {"command": "distill", "samples_of": options.model.model_name_or_path}
    arguments |= (
        flatten(options.task, options.mixture) | settings | {"sample_batch_size": options.student.sample_batch_size}
    )
    responses = sample_mixture(
        mixture.requires_grad_(False).to(PartialState().device), tokenizer, task, problems,
        str(Path(args.output_dir) / SAMPLES_FOLDER), {k: v for k, v in arguments.items() if k not in kept_out},
        batch_size=options.student.sample_batch_size, decoding=args.decoding, **settings,
    )  # fmt: skip
    rows = right_rows(task, problems, responses)
    console.print(f"{len(rows)} of {len(responses)} samples of the mixture are right and ended.", soft_wrap=True)
    set_seed(args.seed)  # a new adapter starts at random
    dataset, _ = sft_dataset(rows, tokenizer, None)
    trainer = ResumableSFTTrainer(
        student, args=sft_config(args), train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
    )
    return trainer, rows


def report(
    student: "PreTrainedModel",
    mixture: "LogitMixForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    task: "Task",
    problems: "Sequence[Problem]",
    options: DistillOptions,
    step: int,
) -> None:
    """Compare the student with the mixture and its parts on the problems."""
    from pathlib import Path

    from logitmix.evaluation.report.distillation_report import report_student

    args = options.training
    folder = Path(args.output_dir) / REPORT_FOLDER
    arguments = {"command": "distill", "report_of": args.output_dir, "step": step}
    arguments |= flatten(options.task) | {"max_new_tokens": args.max_completion_length}
    title = f"What {Path(args.output_dir).name} keeps of its mixture, on {task.name}"
    sentence = report_student(
        student, mixture.eval(), tokenizer, task, problems, folder, title, arguments, args.max_completion_length,
        options.student.report_batch_size,
    )  # fmt: skip
    console.print(sentence, soft_wrap=True)
    console.print(f"The report is in {folder}.", soft_wrap=True)
