"""The names of TRL's `DistillationTrainer` that distillation replaces or reads; fails first when TRL moves one."""

import inspect

import torch
from trl import DistillationTrainer

from logitmix.training.distillation_trl_patches import PatchedDistillationTrainer
from tests.helpers.distill import distiller_of
from tests.helpers.grpo import PROMPTS


def parameters(method) -> list[str]:
    return list(inspect.signature(method).parameters)


def test_trl_has_the_methods_that_are_replaced():
    assert parameters(DistillationTrainer._compute_loss) == [
        "self", "unwrapped_student", "inputs", "num_items_in_batch",
    ]  # fmt: skip
    assert parameters(DistillationTrainer._generate_single_turn)[:2] == ["self", "prompt_ids"]
    assert parameters(DistillationTrainer._tokenize_prompts) == ["self", "prompts"]
    assert parameters(DistillationTrainer._get_train_sampler) == ["self", "dataset"]


def test_trl_computes_the_loss_through_ours_inside_the_wrapped_forward(tmp_path):
    trainer = distiller_of(tmp_path)
    calls = []
    own = trainer.loss

    def loss(student, batch, num_tokens):
        calls.append((student, set(batch), num_tokens))
        return own(student, batch, num_tokens)

    trainer.loss = loss
    trainer.train()
    assert len(calls) == 2
    student, keys, num_tokens = calls[0]
    assert student is trainer.model
    assert {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"} <= keys
    assert isinstance(num_tokens, torch.Tensor)


def test_trl_samples_through_ours(tmp_path):
    trainer = distiller_of(tmp_path)
    seen = {}
    own = trainer.sample
    trainer.sample = lambda prompt_ids, *args, **kwargs: seen.setdefault("ids", own(prompt_ids, *args, **kwargs))
    trainer.check_prompts = lambda prompt_ids: seen.setdefault("prompts", prompt_ids)
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])
    assert [len(ids) for ids in seen["ids"]] == batch["completion_mask"].sum(1).tolist()
    assert seen["prompts"] == trainer.tokenize_prompts(PROMPTS)


def test_state_that_a_checkpoint_holds_exists(tmp_path):
    trainer = distiller_of(tmp_path)
    assert trainer._step == 0
    assert trainer._total_train_tokens == 0
    assert trainer.step_metrics == {}
    assert type(trainer._get_train_sampler()).__name__ == "EpochRepeatSampler"
    assert trainer.text_tokenizer is trainer.processing_class


def test_an_update_samples_anew(tmp_path):
    """Completions serve one update, so that a checkpoint, between updates, need not hold them."""
    trainer = distiller_of(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=3)
    sampled_at = []
    own = trainer.sample

    def sample(*args, **kwargs):
        sampled_at.append((trainer.state.global_step, trainer._step))
        return own(*args, **kwargs)

    trainer.sample = sample
    trainer.train()
    assert sampled_at == [(0, 0), (1, 2), (2, 4)]
    assert issubclass(type(trainer), PatchedDistillationTrainer)
