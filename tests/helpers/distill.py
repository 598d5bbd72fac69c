"""Trainers that distil a tiny mixture."""

from accelerate import DistributedType, PartialState
from datasets import Dataset

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.distillation import LogitMixDistillationConfig, MixtureDistillationTrainer
from logitmix.training.students import build_student
from tests.helpers.adapters import lora
from tests.helpers.arguments import SMALL_RUN
from tests.helpers.grpo import PROMPTS, mixture
from tests.helpers.members import character_tokenizer
from tests.helpers.two_processes import mixture as mixture_of_adapters


def distiller_of(
    tmp_path,
    teacher: LogitMixForCausalLM | None = None,
    student="policy",
    tokenizer=None,
    peft_config=None,
    sharded=False,
    **kwargs,
) -> MixtureDistillationTrainer:
    teacher = teacher if teacher is not None else mixture()
    arguments = {
        "per_device_train_batch_size": 6,
        "max_completion_length": 7,
        "max_steps": 2,
        "learning_rate": 1e-2,
        **SMALL_RUN,
    } | kwargs
    args = LogitMixDistillationConfig(str(tmp_path), **arguments)
    if sharded:
        # accelerate shards on what it takes for accelerators alone; all that follows runs on the CPU all the same
        PartialState().distributed_type = DistributedType.MULTI_GPU
    result = MixtureDistillationTrainer(
        build_student(teacher, student) if isinstance(student, str) else student,
        teacher,
        args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 8}),
        processing_class=tokenizer or character_tokenizer(),
        peft_config=peft_config,
    )
    result.current_gradient_accumulation_steps = result.args.gradient_accumulation_steps
    return result


def pair_to_distil(on_one_base: bool):
    """A mixture and its student; `on_one_base`, adapters on one base, which the student, a third one, shares."""
    if not on_one_base:
        teacher = mixture()
        return teacher, build_student(teacher, "policy")
    teacher = mixture_of_adapters(adapters=True)
    return teacher, build_student(teacher, "policy", peft_config=lora(target_modules=["q_proj", "down_proj"]))
