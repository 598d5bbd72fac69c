"""TRL's own trainers with a mixture as the teacher: one that reads logits trains, the other refuses it."""

import pytest
import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from tests.helpers.grpo import PROMPTS, mixture
from tests.helpers.members import character_tokenizer, tiny_member

FAST = {
    "per_device_train_batch_size": 2,
    "max_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
}
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def gkd_trainer(tmp_path, teacher, **options):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    rows = [[{"role": "user", "content": p}, {"role": "assistant", "content": "abc"}] for p in PROMPTS]
    return GKDTrainer(
        tiny_member("qwen2", seed=5),
        teacher,
        GKDConfig(str(tmp_path), max_length=40, max_new_tokens=4, **FAST | options),
        train_dataset=Dataset.from_dict({"messages": rows}),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_gkd_compares_with_the_mixture(tmp_path, scheme):
    teacher = mixture(scheme)
    trainer = gkd_trainer(tmp_path, teacher, beta=0.0, temperature=1.0)
    ids = torch.tensor([character_tokenizer()("12+34-5=7")["input_ids"]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "prompts": ids[:, :2]}
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    with torch.no_grad():
        p = teacher(ids).logits[0, :-1].double().log_softmax(-1)
        q = trainer.model(ids).logits[0, :-1].double().log_softmax(-1)
    torch.testing.assert_close(loss.double(), (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"lmbda": 1.0}, {"lmbda": 0.0, "seq_kd": True}], ids=["student", "mixture"])
def test_gkd_trains_on_samples_of_either(tmp_path, options):
    teacher = mixture()
    trainer = gkd_trainer(tmp_path, teacher, learning_rate=1e-2, **options)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_the_distillation_trainer_refuses_a_mixture_in_one_sentence(tmp_path):
    trainer = DistillationTrainer(
        tiny_member("qwen2", seed=5),
        mixture(),
        DistillationConfig(str(tmp_path), max_completion_length=4, **FAST),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=character_tokenizer(),
    )
    with pytest.raises(AttributeError, match=r"a mixture has no last_hidden_state .*MixtureDistillationTrainer"):
        trainer.train()
