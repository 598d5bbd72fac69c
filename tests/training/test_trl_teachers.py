"""TRL's own trainers with a mixture as the teacher: one that reads logits trains, the other refuses it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from logitmix.training.students import build_student
from tests.helpers.arguments import SMALL_RUN
from tests.helpers.distill import distiller_of
from tests.helpers.grpo import PROMPTS, mixture
from tests.helpers.members import character_tokenizer, tiny_member

FAST = SMALL_RUN | {"per_device_train_batch_size": 2, "max_steps": 1}
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


class SideBySide(nn.Module):
    """A mixture of scheme logit with linear heads as one backbone and one head: [W_0 | W_1] · [w_0 h_0 ; w_1 h_1]."""

    def __init__(self, mixture):
        super().__init__()
        self.members, self.weights, self.config = (
            nn.ModuleList(mixture.members),
            mixture.config.weights,
            mixture.config,
        )
        heads = torch.cat([member.get_output_embeddings().weight for member in mixture.members], dim=1)
        self.head = nn.Linear(heads.shape[1], heads.shape[0], bias=False)
        self.head.weight = nn.Parameter(heads.detach().clone())

    @property
    def base_model(self):
        return self.backbone

    def backbone(self, input_ids, attention_mask, **kwargs):
        states = [member.base_model(input_ids, attention_mask=attention_mask)[0] for member in self.members]
        return SimpleNamespace(
            last_hidden_state=torch.cat([w * h for w, h in zip(self.weights, states, strict=True)], dim=-1)
        )

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_loss_is_trls_for_members_whose_states_are_side_by_side(tmp_path, beta):
    teacher = mixture("logit")
    ours = distiller_of(tmp_path, teacher, beta=beta)
    trls = DistillationTrainer(
        build_student(teacher, "policy"),
        SideBySide(copy.deepcopy(teacher)),
        DistillationConfig(str(tmp_path), beta=beta, max_completion_length=7, **FAST),
        train_dataset=ours.train_dataset,
        processing_class=character_tokenizer(),
    )
    torch.manual_seed(0)
    batch = ours._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])
    losses = [trainer.compute_loss(trainer.model, batch) for trainer in (ours, trls)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    gradients = [
        torch.autograd.grad(loss, list(t.model.parameters())) for loss, t in zip(losses, (ours, trls), strict=True)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
