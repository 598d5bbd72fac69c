"""Trainers that distil a tiny mixture."""

from datasets import Dataset

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.distillation import LogitMixDistillationConfig, MixtureDistillationTrainer
from logitmix.training.students import build_student
from tests.helpers.arguments import SMALL_RUN
from tests.helpers.grpo import PROMPTS, mixture
from tests.helpers.members import character_tokenizer


def distiller_of(
    tmp_path, teacher: LogitMixForCausalLM | None = None, student="policy", tokenizer=None, peft_config=None, **kwargs
) -> MixtureDistillationTrainer:
    teacher = teacher if teacher is not None else mixture()
    arguments = {
        "per_device_train_batch_size": 6,
        "max_completion_length": 7,
        "max_steps": 2,
        "learning_rate": 1e-2,
        **SMALL_RUN,
    } | kwargs
    result = MixtureDistillationTrainer(
        build_student(teacher, student) if isinstance(student, str) else student,
        teacher,
        LogitMixDistillationConfig(str(tmp_path), **arguments),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 8}),
        processing_class=tokenizer or character_tokenizer(),
        peft_config=peft_config,
    )
    result.current_gradient_accumulation_steps = result.args.gradient_accumulation_steps
    return result
