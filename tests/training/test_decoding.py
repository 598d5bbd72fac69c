"""Rollouts by joint and alternating decoding: what is scored, logged, resumed and refused."""

import time

import pytest
import torch
from peft import LoraConfig

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.grpo import PROMPTS, mixture, trainer_of
from tests.helpers.members import tiny_member


def logits_of_members(trainer):
    """The dtypes of the logits that each member gives, as it gives them."""
    seen = {name: set() for name in ("policy", "anchor_0")}
    for name, dtypes in seen.items():
        member = getattr(trainer.model, name)
        member.register_forward_hook(lambda *call, dtypes=dtypes: dtypes.add(call[-1].logits.dtype))
    return seen


@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("decoding", ["joint", "alternating", "auto"])
def test_rollouts_are_scored_as_they_were_sampled(tmp_path, decoding, scheme):
    """The ratio before an update is 1, and members that agree with the mixture write most of it."""
    trainer = trainer_of(tmp_path, mixture(scheme), decoding=decoding, max_steps=3)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "ratio/min" in log]
    assert len(logs) == 3
    for log in logs:
        assert log["ratio/min"] == pytest.approx(1, abs=1e-4)
        assert log["ratio/max"] == pytest.approx(1, abs=1e-4)
        if decoding == "joint":
            assert not any(name.startswith("decoding/") for name in log)
        else:
            assert 0 < log["decoding/acceptance"] < 1
            assert log["decoding/passes_per_token"] == pytest.approx(2 - log["decoding/acceptance"], abs=0.15)


@torch.no_grad()
def test_member_logprobs_of_rollouts_mix_to_the_scored_log_probs(tmp_path):
    trainer = trainer_of(tmp_path, mixture("prob", alpha=0.3))
    tokenizer = trainer.processing_class
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(0)
    output = trainer.model.generate(
        **inputs, do_sample=True, top_k=0, max_new_tokens=9, decoding="alternating", output_member_logprobs=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    T = output.member_logprobs.shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.arange(T) < output.lengths[:, None]], dim=1)
    scored, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, output.sequences, mask, T)
    mixed = (output.member_logprobs.exp() @ torch.tensor([0.7, 0.3])).log()
    is_new = torch.arange(T) < output.lengths[:, None]
    torch.testing.assert_close(scored[is_new], mixed[is_new], atol=1e-4, rtol=0)


@pytest.mark.parametrize("decoding", ["joint", "alternating"])
def test_members_sample_under_the_trainers_autocast(tmp_path, decoding):
    trainer = trainer_of(tmp_path, bf16=True, decoding=decoding)
    seen = logits_of_members(trainer)
    trainer.sample([trainer.processing_class(prompt)["input_ids"] for prompt in PROMPTS])
    assert seen == {"policy": {torch.bfloat16}, "anchor_0": {torch.bfloat16}}


def test_the_choice_does_not_depend_on_the_clock(tmp_path):
    rollouts = []
    for delay in (0, 1):
        trainer = trainer_of(tmp_path / str(delay), decoding="auto")
        if delay:
            trainer.model.policy.register_forward_hook(lambda *_: time.sleep(0.002))
        trainer.train()
        rollouts.append(trainer.model.policy.state_dict())
    for name, weights in rollouts[0].items():
        assert torch.equal(weights, rollouts[1][name]), name


def test_adapters_on_one_model_decode_jointly_and_alternating_is_refused(tmp_path):
    def shared():
        return LogitMixForCausalLM.from_members(
            base := tiny_member(), base, peft_config=LoraConfig(r=2, init_lora_weights=False), alpha=0.4
        )

    trainer = trainer_of(tmp_path, shared(), max_steps=1)
    trainer.train()
    assert not any("decoding/" in name for log in trainer.state.log_history for name in log)
    with pytest.raises(ValueError, match="alternating decoding cannot be used with members that share one model"):
        trainer_of(tmp_path, shared(), decoding="alternating")


def test_wrong_values_are_refused(tmp_path):
    with pytest.raises(ValueError, match="decoding is 'fast'; it must be one of 'auto', 'joint', 'alternating'"):
        trainer_of(tmp_path, decoding="fast")
    with pytest.raises(ValueError, match="score_truncated is set, but decoding is 'alternating'"):
        trainer_of(tmp_path, decoding="alternating", score_truncated=True, top_k=5)
    with pytest.raises(ValueError, match="cannot be used with a Qwen2ForCausalLM, which is no mixture"):
        trainer_of(tmp_path, tiny_member(), decoding="alternating")
