"""The trainer scores what it samples, and its loss is eq. 6."""

import copy

import grpo_loop
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GenerationConfig
from trl import GRPOTrainer

from logitmix.mixture.generation import generate_completions
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.grpo import LogitMixGRPOTrainer, question_weights
from tests.helpers.grpo import EPS, PROMPTS, assert_same_weights, count_vowels, generated, mixture, sampled, trainer_of
from tests.helpers.members import character_tokenizer, tiny_member


@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("anchor", ["llama", "gpt2", "gemma2"])
def test_scored_log_probs_are_those_of_the_distribution_sampled_from(tmp_path, scheme, temperature, anchor):
    trainer = trainer_of(tmp_path, mixture(scheme, anchor=anchor), temperature=temperature)
    trainer.train()  # the contract holds for the trained policy too, and on the wrapped model
    ids, mask, length, expected = sampled(trainer)
    with torch.no_grad():
        scored, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, length, compute_entropy=True
        )
    torch.testing.assert_close(scored, expected, atol=1e-5, rtol=0)
    assert (entropy > 0).all()


def test_the_contract_can_fail(tmp_path):
    """The policy alone gives the same tokens other log-probabilities."""
    trainer = trainer_of(tmp_path)
    ids, mask, length, expected = sampled(trainer)
    with torch.no_grad():
        policy_alone, _ = trainer.model.score(ids, mask, ids, alpha=0.0)
    assert (policy_alone[:, -length:] - expected).abs().max() > 0.1


def test_trls_own_trainer_fails_loudly_rather_than_score_the_policy_alone(tmp_path):
    trainer = trainer_of(tmp_path, trainer=GRPOTrainer)
    ids, mask, length, _ = sampled(trainer)
    with pytest.raises(AttributeError):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)


@pytest.mark.parametrize("mode", ["rollouts", "greedy"])
def test_a_checkpoints_generation_config_changes_nothing(mode):
    model, tokenizer = mixture(), character_tokenizer()
    settings = {"max_new_tokens": 12} | ({"do_sample": False} if mode == "greedy" else {"do_sample": True, "top_k": 0})
    prompt_ids = tokenizer(PROMPTS)["input_ids"]
    torch.manual_seed(0)
    plain = generate_completions(model, tokenizer, prompt_ids, settings)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.2, top_k=3, top_p=0.5, min_p=0.3, repetition_penalty=2.0, no_repeat_ngram_size=1,
        suppress_tokens=list(range(3, 30)), min_new_tokens=5, num_beams=2,
    )  # fmt: skip
    own = copy.deepcopy(model.generation_config)
    torch.manual_seed(0)
    assert generate_completions(model, tokenizer, prompt_ids, settings) == plain
    assert model.generation_config == own


def oracle(trainer, inputs, ids, mask, alpha, temperature):
    """Loss and policy gradients of examples/grpo_loop.py on the same batch."""
    model = copy.deepcopy(trainer.model)
    completions = [
        trainer.processing_class.decode(row[m.bool()], skip_special_tokens=True)
        for row, m in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
    ]
    rewards = torch.tensor(count_vowels(completions)).view(3, 4)
    advantages = grpo_loop.advantages(rewards, eps=EPS)
    log_probs = grpo_loop.token_log_probs(
        model.policy, model.anchor_0, ids, mask, inputs["completion_ids"].shape[1], alpha, temperature
    )
    loss = grpo_loop.group_loss(log_probs, inputs["old_per_token_logps"], advantages, inputs["completion_mask"])
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.policy.named_parameters()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradients_are_those_of_the_plain_loop(tmp_path, temperature):
    trainer = trainer_of(tmp_path, temperature=temperature)
    inputs, ids, mask = generated(trainer)
    assert len(inputs["completion_mask"].sum(1).unique()) > 1, "lengths differ, or the normalisers could not"
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    expected, gradients = oracle(trainer, inputs, ids, mask, 0.4, temperature)
    torch.testing.assert_close(loss.detach(), expected, atol=1e-6, rtol=1e-6)
    for name, parameter in trainer.model.policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-5)
    assert all(p.grad is None for p in trainer.model.anchor_0.parameters())
    assert loss.detach().abs() > 1e-3


def test_the_loss_of_a_batch_taken_in_parts_adds_up_to_the_whole(tmp_path):
    whole = trainer_of(tmp_path / "whole")
    inputs, ids, mask = generated(whole)
    expected, _ = oracle(whole, inputs, ids, mask, 0.4, 1.0)
    parts = trainer_of(tmp_path / "parts", per_device_train_batch_size=4, gradient_accumulation_steps=3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))  # TRL shuffles rollouts across questions
    total = 0.0
    for rows in order.split(4):
        part = {
            key: value[rows] if isinstance(value, torch.Tensor) and value.dim() else value
            for key, value in inputs.items()
        }
        total += parts._compute_loss(parts.model, part).item()
    assert total == pytest.approx(expected.item(), abs=1e-6)


def test_the_clip_range_may_be_asymmetric(tmp_path):
    """DAPO's clip-higher, against eq. 6 written out token by token."""
    low, high = 0.1, 0.5
    trainer = trainer_of(tmp_path, epsilon=low, epsilon_high=high)
    inputs, ids, mask = generated(trainer)
    now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, inputs["completion_ids"].shape[1])
    completions = trainer.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    advantages = grpo_loop.advantages(torch.tensor(count_vowels(completions)).view(3, 4), eps=EPS)
    questions, clipped = [], {"low": 0, "high": 0}
    for q in range(3):
        gains = []
        for i in range(4):
            a = advantages[q, i].item()
            tokens = inputs["completion_mask"][4 * q + i].bool()
            log_ratios = (now - inputs["old_per_token_logps"])[4 * q + i][tokens]
            for ratio in log_ratios.exp().tolist():
                gains.append(min(ratio * a, max(1 - low, min(ratio, 1 + high)) * a))
                clipped["low"] += ratio < 1 - low and a < 0
                clipped["high"] += ratio > 1 + high and a > 0
        questions.append(sum(gains) / len(gains))
    trainer._metrics["eval"].clear()
    loss = trainer._compute_loss(trainer.model, inputs).item()
    assert loss == pytest.approx(-sum(questions) / 3, abs=1e-6)
    assert min(clipped.values()) > 0
    total = inputs["completion_mask"].sum().item()
    for side, count in clipped.items():
        assert trainer._metrics["eval"][f"clip_ratio/{side}_mean"] == [pytest.approx(count / total)]


def test_prob_scheme_gradients_are_those_of_the_mixed_probabilities(tmp_path):
    """The oracle mixes only logits, so the arithmetic mixture is written out here."""
    trainer = trainer_of(tmp_path, mixture("prob"))
    inputs, ids, mask = generated(trainer)
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, inputs).backward()
    model = copy.deepcopy(trainer.model)
    model.zero_grad()
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    length = inputs["completion_ids"].shape[1]
    policy, anchor = (
        member(ids, attention_mask=mask, position_ids=position_ids).logits[:, -length - 1 : -1].softmax(-1)
        for member in (model.policy, model.anchor_0)
    )
    log_probs = (0.6 * policy + 0.4 * anchor).log().gather(-1, inputs["completion_ids"][..., None])[..., 0]
    completions = trainer.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    advantages = grpo_loop.advantages(torch.tensor(count_vowels(completions)).view(3, 4), eps=EPS)
    grpo_loop.group_loss(log_probs, inputs["old_per_token_logps"], advantages, inputs["completion_mask"]).backward()
    for name, parameter in trainer.model.policy.named_parameters():
        torch.testing.assert_close(parameter.grad, model.policy.get_parameter(name).grad, atol=1e-5, rtol=1e-4)


def test_question_weights_turn_a_token_mean_into_a_mean_over_questions():
    lengths = torch.tensor([1, 3, 10, 30])
    per_token = torch.arange(44.0)
    factors = question_weights(lengths, 2).repeat_interleave(lengths)
    expected = (per_token[:4].mean() + per_token[4:].mean()) / 2
    torch.testing.assert_close((factors * per_token).sum() / 44, expected)


def test_rollouts_of_a_0_1_0_checkpoint_have_the_same_loss(tmp_path):
    """That version saved advantages with the question's weight in them."""
    trainer = trainer_of(tmp_path)
    inputs, *_ = generated(trainer)
    assert inputs["question_weights"].unique().numel() > 1
    loss = trainer._compute_loss(trainer.model, inputs)
    old = {name: value for name, value in inputs.items() if name != "question_weights"}
    old["advantages"] = inputs["advantages"] * inputs["question_weights"]
    torch.testing.assert_close(trainer._compute_loss(trainer.model, old), loss)


def test_a_question_without_tokens_gets_factor_0():
    assert question_weights(torch.tensor([0, 0, 2, 4]), 2).tolist() == [0, 0, 0.5, 0.5]
    assert question_weights(torch.tensor([0, 0]), 2).tolist() == [0, 0]


def test_groups_of_equal_rewards_leave_the_policy_unchanged(tmp_path):
    trainer = trainer_of(tmp_path, reward=lambda completions, **kwargs: [1.0] * len(completions))
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_training_changes_the_policy_and_no_bit_of_the_anchor(tmp_path):
    trainer = trainer_of(tmp_path)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("policy.") for name in changed)


def test_trls_loss_types_can_be_chosen(tmp_path):
    losses = {}
    for loss_type in ("group", "grpo", "dr_grpo", "bnpo"):
        trainer = trainer_of(tmp_path, loss_type=loss_type)
        inputs, _, _ = generated(trainer)
        losses[loss_type] = trainer._compute_loss(trainer.model, inputs).item()
    assert len({round(loss, 8) for loss in losses.values()}) == 4, losses


def test_a_stop_string_ends_a_rollout_and_stays_in_it(tmp_path):
    trainer = trainer_of(tmp_path, stop_strings=["e"], max_completion_length=40)
    prompt_ids = trainer.processing_class(PROMPTS * 4)["input_ids"]
    torch.manual_seed(0)
    completions, _ = trainer._generate_single_turn(prompt_ids, None, {}, 4)
    texts = trainer.processing_class.batch_decode(completions)
    stopped = [text for text in texts if "e" in text.removesuffix("<eos>")]
    assert stopped
    assert all(text.endswith("e") and text.count("e") == 1 for text in stopped)


def test_a_stop_string_that_no_tokens_spell_is_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"the stop string 'ä' would never be met"):
        trainer_of(tmp_path, stop_strings=["e", "ä"])


def test_completions_hold_no_padding_where_padding_is_eos():
    model, tokenizer = mixture(), character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    completions = generate_completions(
        model, tokenizer, tokenizer(PROMPTS * 4)["input_ids"], {"do_sample": True, "max_new_tokens": 40}, ["e"]
    )
    for text in tokenizer.batch_decode(completions):
        assert "<eos>" not in text[:-5], "EOS only where it was sampled, at the end"
        assert not text.endswith("e<eos>"), "no EOS after a stop string"


def test_a_completion_that_a_stop_string_ended_is_not_counted_as_truncated(tmp_path):
    trainer = trainer_of(tmp_path, stop_strings=["e"], max_completion_length=75, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["completions/clipped_ratio"] < 1
    assert log["completions/mean_terminated_length"] > 0


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    whole = trainer_of(tmp_path / "whole", max_steps=4)
    whole.train()
    half = trainer_of(tmp_path / "half", max_steps=4, save_strategy="steps", save_steps=2)
    half.train()
    resumed = trainer_of(tmp_path / "half", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert_same_weights(resumed.model, whole.model)


def test_the_policy_and_the_anchor_can_be_paths(tmp_path):
    for name, seed in (("base", 0), ("sft", 1)):
        tiny_member("qwen2", seed=seed).save_pretrained(tmp_path / name)
        character_tokenizer().save_pretrained(tmp_path / name)
    trainer = LogitMixGRPOTrainer(
        str(tmp_path / "base"),
        reward_funcs=count_vowels,
        args=LogitMixGRPOConfig(
            str(tmp_path / "out"),
            anchor=str(tmp_path / "sft"),
            alpha=0.3,
            max_completion_length=9,
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )
    assert isinstance(trainer.model, LogitMixForCausalLM)
    assert trainer.model.alpha == 0.3


def test_a_model_without_an_anchor_trains_as_trl_does(tmp_path):
    kwargs = {"loss_type": "grpo", "max_steps": 2}
    ours = trainer_of(tmp_path / "ours", tiny_member(), **kwargs)
    ours.train()
    theirs = trainer_of(tmp_path / "theirs", tiny_member(), trainer=GRPOTrainer, **kwargs)
    theirs.train()
    assert_same_weights(ours.model, theirs.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1}, "no KL term"),
        ({"beta": 0.1, "loss_type": "grpo"}, "does not say which anchor its KL is to: kl_to='anchor' is the"),
        ({"kl_to": "anchor"}, "beta is 0 and there is no KL"),
        ({"beta": 0.1, "loss_type": "grpo", "kl_to": "start"}, "kl_to is 'start'; it must be 'anchor'"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
        ({"use_transformers_continuous_batching": True}, "continuous_batching"),
        ({"stop_strings": ["e"], "mask_truncated_completions": True}, "mask_truncated_completions"),
        ({"anchor": "somewhere"}, "anchor of its own"),
        ({"max_completion_length": 126}, "exceeds the members' context of 128"),
    ],
)
def test_options_that_would_not_train_the_mixture_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **options)


def test_kl_to_the_anchor_is_that_of_the_anchor_alone(tmp_path):
    """`loss(beta) - loss(0)` is beta times the mean of TRL's estimate `e^d - d - 1`, d = log anchor - log mixture."""
    temperature, beta = 0.7, 0.3
    options = {"loss_type": "grpo", "temperature": temperature, "use_bias_correction_kl": False}
    trainer = trainer_of(tmp_path, beta=beta, kl_to="anchor", **options)
    assert (trainer.beta, trainer.args.beta) == (beta, beta)
    inputs, ids, mask = generated(trainer)
    length = inputs["completion_ids"].shape[1]
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = trainer.model.anchor_0(ids, attention_mask=mask, position_ids=position_ids).logits
    anchor = (
        (logits[:, -length - 1 : -1] / temperature)
        .log_softmax(-1)
        .gather(-1, inputs["completion_ids"][..., None])[..., 0]
    )
    tokens = inputs["completion_mask"].bool()
    torch.testing.assert_close(inputs["ref_per_token_logps"][tokens], anchor[tokens], atol=1e-5, rtol=1e-5)

    now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)
    d = anchor - now
    estimate = ((d.exp() - d - 1) * tokens).sum(1) / tokens.sum(1)
    with_kl = trainer._compute_loss(trainer.model, inputs)
    trainer.beta = 0.0
    without = trainer._compute_loss(trainer.model, inputs)
    assert (with_kl - without).item() == pytest.approx(beta * estimate.mean().item(), rel=1e-4)


def test_a_run_with_kl_to_the_anchor_logs_the_kl(tmp_path):
    trainer = trainer_of(tmp_path, beta=0.1, kl_to="anchor", loss_type="grpo")
    trainer.train()
    assert trainer.state.log_history[0]["kl"] > 0


def test_kl_to_an_anchor_needs_one(tmp_path):
    with pytest.raises(ValueError, match="the model has no anchors"):
        trainer_of(tmp_path, tiny_member(), beta=0.1, kl_to="anchor", loss_type="grpo")


def test_gradient_checkpointing_gives_the_same_step(tmp_path):
    plain = trainer_of(tmp_path / "plain", max_steps=1)
    plain.train()
    checkpointed = trainer_of(tmp_path / "checkpointed", max_steps=1, gradient_checkpointing=True)
    checkpointed.train()
    assert_same_weights(checkpointed.model, plain.model)


def test_a_mixture_keeps_its_alpha_or_takes_the_one_asked_for_and_the_arguments_say_which(tmp_path):
    kept = trainer_of(tmp_path, mixture(alpha=0.4))
    assert (kept.args.alpha, kept.args.scheme, kept.model.alpha) == (0.4, "logit", 0.4)
    asked = trainer_of(tmp_path, mixture(alpha=0.4), alpha=0.2)
    assert (asked.args.alpha, asked.model.alpha) == (0.2, 0.2)
    with pytest.raises(ValueError, match="scheme is 'prob', but the mixture was built with 'logit'"):
        trainer_of(tmp_path, mixture(), scheme="prob")


def test_an_anchor_that_is_the_policys_own_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="anchor_0 is the policy's own model, so it would train with it; give"):
        trainer_of(tmp_path, LogitMixForCausalLM.from_members(member := tiny_member(), member, alpha=-0.5))


def test_a_mixture_without_the_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the policy's weight in the mixture is 0"):
        trainer_of(tmp_path, mixture(alpha=1.0))


def test_rollouts_in_small_batches_are_as_many_and_as_long(tmp_path):
    trainer = trainer_of(tmp_path, rollout_batch_size=5, generation_kwargs={"suppress_tokens": [2]})
    completions, _ = trainer._generate_single_turn(trainer.processing_class(PROMPTS * 4)["input_ids"], None, {}, 4)
    assert [len(ids) for ids in completions] == [9] * 12


def test_members_given_as_models_with_different_tokenizers_are_refused(tmp_path):
    members = []
    for name, characters in (("policy", "abc0123"), ("anchor", "3210cba")):
        tiny_member().save_pretrained(tmp_path / name)
        character_tokenizer(characters).save_pretrained(tmp_path / name)
        members.append(AutoModelForCausalLM.from_pretrained(tmp_path / name))
    with pytest.raises(ValueError, match="tokenizers differ: token 3"):
        LogitMixForCausalLM.from_members(*members)


def test_the_seed_decides_how_a_new_adapter_starts(tmp_path):
    for name, seed in (("base", 0), ("sft", 1)):
        tiny_member(seed=seed).save_pretrained(tmp_path / name)
        character_tokenizer().save_pretrained(tmp_path / name)
    starts = []
    for state, seed in ((1, 0), (2, 0), (2, 3)):
        torch.manual_seed(state)
        trainer = LogitMixGRPOTrainer(
            str(tmp_path / "base"),
            reward_funcs=count_vowels,
            args=LogitMixGRPOConfig(
                str(tmp_path / "out"), anchor=str(tmp_path / "sft"), seed=seed, max_completion_length=9, use_cpu=True,
                bf16=False, report_to=[],
            ),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
        )  # fmt: skip
        starts.append(torch.cat([p.flatten() for name, p in trainer.model.named_parameters() if "lora_A" in name]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])
