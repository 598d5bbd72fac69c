"""The trust-region teacher of SDPO: eq. 11, its proposition, and TRL's trainer with it."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.optimize import minimize
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from logitmix.mixture.mixing import mix_logits
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.sdpo import TrustRegionSDPOTrainer, TrustRegionTeacher
from tests.helpers.arguments import SMALL_RUN
from tests.helpers.members import PAD, character_tokenizer, tiny_member

POLICY, REFERENCE = tiny_member("qwen2", 0), tiny_member("llama", 1)
# the same completions of 3 tokens after x (2 or 3 tokens) and after x and f
COMPLETION = torch.tensor([[9, 12, 4], [20, 7, 33]])
PROMPT = torch.tensor([[PAD, 5, 17], [8, 30, 41]])
WITH_FEEDBACK = torch.tensor([[PAD, 5, 17, 6, 6], [8, 30, 41, 11, 50]])


def whole(prompts):
    ids = torch.cat([prompts, COMPLETION], dim=1)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@pytest.mark.parametrize(("reads", "context"), [("prompt", PROMPT), ("feedback", WITH_FEEDBACK)])
def test_the_teacher_is_that_of_eq_11(reads, context):
    teacher = TrustRegionTeacher(POLICY, copy.deepcopy(REFERENCE), 0.3, reads)
    teacher.set_prompts(PROMPT, (PROMPT != PAD).long())
    found = teacher(**whole(WITH_FEEDBACK), logits_to_keep=4).logits
    assert not found.requires_grad
    for b in range(2):
        for t in range(3):
            rows = [torch.cat([p[b][p[b] != PAD], COMPLETION[b, :t]])[None] for p in (WITH_FEEDBACK, context)]
            with torch.no_grad():
                theta, ref = (
                    member(row).logits[0, -1].double().softmax(-1)
                    for member, row in zip((POLICY, REFERENCE), rows, strict=True)
                )
            expected = ref**0.7 * theta**0.3
            torch.testing.assert_close(
                found[b, t].softmax(-1), (expected / expected.sum()).float(), atol=1e-5, rtol=1e-3
            )


def test_where_both_read_the_feedback_the_teacher_is_a_mixture():
    teacher = TrustRegionTeacher(POLICY, copy.deepcopy(REFERENCE), 0.3, "feedback")
    mixture = LogitMixForCausalLM.from_members(copy.deepcopy(POLICY), copy.deepcopy(REFERENCE), alpha=0.7).eval()
    inputs = whole(WITH_FEEDBACK) | {"logits_to_keep": 4}
    with torch.no_grad():
        torch.testing.assert_close(teacher(**inputs).logits, mixture(**inputs).logits)


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.9, 1.0])
def test_the_teacher_solves_the_constrained_problem_of_the_proposition(weight):
    """min_q CE(q, q_theta) - CE(q, q_ref) subject to KL(q || q_ref) <= epsilon, by an independent solver."""
    generator = torch.Generator().manual_seed(3)
    theta, ref = torch.randn(2, 6, generator=generator, dtype=torch.float64).softmax(-1).numpy()
    logits = [torch.from_numpy(np.log(p))[None] for p in (theta, ref)]
    teacher = mix_logits(logits, [weight, 1 - weight]).softmax(-1)[0].numpy()

    def kl(q, p):
        return float(np.sum(q * np.log(q / p)))

    epsilon = kl(teacher, ref)
    solution = minimize(
        lambda q: float(np.sum(q * np.log(ref / theta))),
        np.full(6, 1 / 6) * 0.5 + ref * 0.5,
        method="SLSQP",
        bounds=[(1e-9, 1)] * 6,
        constraints=[
            {"type": "eq", "fun": lambda q: q.sum() - 1},
            {"type": "ineq", "fun": lambda q: epsilon - kl(q, ref)},
        ],
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert solution.success
    np.testing.assert_allclose(solution.x, teacher, atol=1e-5)


def reward(completions, **kwargs):
    return [float(len(text)) for text in completions]


def trainer_of(tmp_path, kind=SDPOTrainer, teacher="live", **kwargs):
    tokenizer = character_tokenizer()
    args = SDPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=5, max_steps=1,
        learning_rate=1e-2, teacher_model_kind=teacher, include_environment_feedback=True, **SMALL_RUN,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["1+2=", "3+"] * 4, "privileged_context": ["it is 3", "no"] * 4})
    return kind(
        copy.deepcopy(POLICY), reward_funcs=reward, args=args, train_dataset=rows, processing_class=tokenizer, **kwargs
    )


def trained(trainer):
    loss = trainer.train().training_loss
    return loss, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_policy_weight_of_1_is_plain_sdpo(tmp_path):
    plain = trained(trainer_of(tmp_path / "plain"))
    same = trained(
        trainer_of(tmp_path / "same", TrustRegionSDPOTrainer, reference=copy.deepcopy(REFERENCE), policy_weight=1)
    )
    other = trained(
        trainer_of(tmp_path / "other", TrustRegionSDPOTrainer, reference=copy.deepcopy(REFERENCE), policy_weight=0.5)
    )
    assert plain[0] == same[0] != 0
    assert torch.equal(plain[1], same[1])
    assert not torch.equal(plain[1], other[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_weight": 0}, "policy_weight is 0, but must be above 0 and at most 1"),
        ({"policy_weight": 1.5}, "policy_weight is 1.5"),
        ({"reference_reads": "f"}, "reference_reads is 'f'; it must be 'prompt' or 'feedback'"),
        ({"reference": tiny_member(vocab_size=70)}, "logits for 61 tokens and the reference for 70"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(changes, message):
    arguments = {"policy": POLICY, "reference": REFERENCE, "policy_weight": 0.5, "reference_reads": "prompt"}
    with pytest.raises(ValueError, match=message):
        TrustRegionTeacher(**arguments | changes)


def test_a_teacher_of_trls_own_choice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher_model_kind is 'ema' .* set teacher_model_kind='live'"):
        trainer_of(
            tmp_path, TrustRegionSDPOTrainer, reference=copy.deepcopy(REFERENCE), policy_weight=0.5, teacher="ema"
        )
