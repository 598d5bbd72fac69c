"""The alpha controller in the trainer: what it validates, on which questions, and when alpha changes."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from logitmix.mixture.generation import GREEDY, generate_completions
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.alpha.controllers import VALIDATING, Counts, adaptive, validation_weighted
from logitmix.training.alpha.validation import FreshQuestions, HeldOut, validate
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.grpo import LogitMixGRPOTrainer
from tests.helpers.arguments import SMALL_RUN
from tests.helpers.grpo import PROMPTS, count_vowels, mixture
from tests.helpers.members import character_tokenizer, tiny_member
from tests.helpers.torchrun import run_two_processes

QUESTIONS = ["1+1=", "23*4=", "ab", "x-y=", "(7)", "q?", "0", "zz=", "5/5="]


def right_if_it_has_an_e(completions, **kwargs):
    return [float("e" in completion) for completion in completions]


def controlled(
    folder,
    controller="adaptive",
    model=None,
    reward=right_if_it_has_an_e,
    train=PROMPTS * 8,
    held_out=QUESTIONS,
    tools=None,
    **options,
):
    """A trainer with four outer steps of 12 rollouts and three updates; `held_out=None` validates on `train`."""
    validating = controller in VALIDATING
    arguments = {
        "alpha_controller": controller,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 3,
        "num_generations": 4,
        "max_completion_length": 9,
        "max_steps": 12,
        "learning_rate": 1e-3,
        **SMALL_RUN,
        **({"validation_size": len(QUESTIONS)} if validating else {}),
        # so few questions give small counts: c_o and c_d go with them
        **({"adaptive_offset": 1, "adaptive_scale": 3} if controller == "adaptive" else {}),
    }
    return LogitMixGRPOTrainer(
        mixture() if model is None else model,
        reward_funcs=reward,
        args=LogitMixGRPOConfig(str(folder), **(arguments | options)),
        train_dataset=Dataset.from_dict({"prompt": train}),
        validation_dataset=Dataset.from_dict({"prompt": held_out}) if validating and held_out else None,
        processing_class=character_tokenizer(),
        tools=tools,
    )


class Watch(TrainerCallback):
    """Records the alpha of each rollout and each update of a trainer."""

    def __init__(self, trainer):
        self.rollouts, self.updates = [], []
        generate, loss = trainer._generate_single_turn, trainer._compute_loss

        def watched_generate(*args, **kwargs):
            self.rollouts.append(trainer.model.alpha)
            return generate(*args, **kwargs)

        def watched_loss(*args, **kwargs):
            self.updates.append(trainer.model.alpha)
            return loss(*args, **kwargs)

        trainer._generate_single_turn, trainer._compute_loss = watched_generate, watched_loss


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


# --- what is counted -------------------------------------------------------------------------------------------------


def naive_counts(trainer, questions, alpha):
    """Decode one greedy response at a time, from one model at one alpha."""
    tokenizer = trainer.processing_class
    settings = GREEDY | {"max_new_tokens": trainer.max_completion_length}
    right = []
    for question in questions:
        ids = tokenizer([question])["input_ids"]
        texts = [
            tokenizer.decode(generate_completions(trainer.model, tokenizer, ids, settings, alpha=a)[0])
            for a in (0.0, alpha, 1.0)
        ]
        right.append(["e" in text.replace("<eos>", "") for text in texts])
    return Counts(
        n=len(questions),
        policy=sum(p for p, _, _ in right),
        mixture=sum(m for _, m, _ in right),
        forgetting=sum(p and not m for p, m, _ in right),
        gain=sum(m and not p for p, m, _ in right),
        anchor=sum(a for _, _, a in right),
    )


@pytest.mark.parametrize("rollout_batch_size", [None, 5])
@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_one_batch_of_responses_is_counted_as_one_response_at_a_time(tmp_path, scheme, rollout_batch_size):
    trainer = controlled(
        tmp_path, model=mixture(scheme), max_completion_length=12, rollout_batch_size=rollout_batch_size
    )
    questions = [question + end for question in QUESTIONS for end in ("", "=", "?a", "8,")]
    rows = [{"prompt": question} for question in questions]
    counts = validate(trainer, rows, 0.4, with_anchor=True)
    assert counts == naive_counts(trainer, questions, 0.4)
    assert counts.forgetting > 0
    assert counts.gain > 0
    assert len({counts.policy, counts.mixture, counts.anchor}) >= 2, "they differ, or a mistake could hide"
    assert validate(trainer, rows, 0.4, with_anchor=False).anchor is None


def test_a_response_is_correct_where_the_weighted_rewards_reach_1(tmp_path):
    rewards = {"1": (1.0, 1.0), "2": (1.0, 0.4), "3": (0.5, 1.0), "4": (None, 2.0), "5": (None, None)}
    trainer = controlled(
        tmp_path,
        reward=[
            lambda prompts, **_: [rewards[p][0] for p in prompts],
            lambda prompts, **_: [rewards[p][1] for p in prompts],
        ],
        reward_weights=[1.0, 0.5],
    )
    right = {
        prompt: validate(trainer, [{"prompt": prompt}], 0.4, with_anchor=False).mixture == 1 for prompt in rewards
    }
    assert right == {"1": True, "2": True, "3": True, "4": True, "5": False}


def test_the_columns_of_a_question_reach_the_reward(tmp_path):
    seen = []

    def reward(completions, gold, **kwargs):
        seen.extend(gold)
        return [0.0] * len(completions)

    trainer = controlled(tmp_path, reward=reward)
    validate(trainer, [{"prompt": "1+1=", "gold": "2"}, {"prompt": "ab", "gold": "c"}], 0.4, with_anchor=False)
    assert seen == ["2", "c"] * 2


# --- when alpha changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("controller", "options"),
    [
        ("adaptive", {}),
        ("validation_weighted", {}),
        ("linear", {"alpha_end": 0.1}),
        ("piecewise", {"alpha_points": ["2:0.2", "7:0.8"]}),
    ],
)
@pytest.mark.parametrize("iterations", [1, 2])
def test_rollouts_and_the_updates_that_use_them_have_one_alpha(tmp_path, controller, options, iterations):
    steps = 12 * iterations
    trainer = controlled(tmp_path, controller, num_iterations=iterations, max_steps=steps, **options)
    watch = Watch(trainer)
    trainer.train()
    assert len(watch.rollouts) == 4
    assert watch.updates == [alpha for alpha in watch.rollouts for _ in range(3 * iterations)]
    assert len(set(watch.rollouts)) >= 3, "alpha did change"
    assert watch.rollouts[0] == 0.4
    assert logged(trainer, "alpha") == watch.updates, "each update logs the alpha it used"


def test_the_first_loss_of_a_generation_has_ratios_of_1(tmp_path):
    """If alpha changed between rollouts and updates, the ratio would not be 1 before an update."""
    trainer = controlled(tmp_path, num_iterations=2, max_steps=24)
    ratios = []
    loss = trainer._compute_loss

    def watched(model, inputs):
        if trainer._step % 6 == 0:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            now, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])
            ratios.append(((now - inputs["old_per_token_logps"]) * inputs["completion_mask"]).exp().detach())
        return loss(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    assert len(ratios) == 4
    for ratio in ratios:
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)


def test_adaptive_follows_eq_9_from_the_logged_counts(tmp_path):
    trainer = controlled(tmp_path)
    trainer.train()
    s1, s2, s3 = (logged(trainer, f"validation/{name}") for name in ("s1", "s2", "s3"))
    assert len(s1) == 4, "once an outer step"
    assert s3 == [(b - a - 1) / 3 for a, b in zip(s1, s2, strict=True)]
    policy, mix = (logged(trainer, f"validation/{name}_accuracy") for name in ("policy", "mixture"))
    assert [9 * (m - p) for p, m in zip(policy, mix, strict=True)] == pytest.approx(
        [b - a for a, b in zip(s1, s2, strict=True)]
    )
    expected = [adaptive(Counts(9, 0, 0, int(a), int(b)), 1, 3) for a, b in zip(s1, s2, strict=True)]
    assert logged(trainer, "alpha")[3::3] == expected[:3]
    assert trainer.model.alpha == expected[3]
    assert all(seconds > 0 for seconds in logged(trainer, "time/validation"))


def test_validation_weighted_follows_the_logged_accuracies(tmp_path):
    trainer = controlled(tmp_path, "validation_weighted")
    trainer.train()
    alpha = 0.4
    for accuracies in zip(
        *(logged(trainer, f"validation/{name}_accuracy") for name in ("policy", "mixture", "anchor")), strict=True
    ):
        policy, mix, anchor = (round(9 * accuracy) for accuracy in accuracies)
        alpha = validation_weighted(alpha, Counts(9, policy, mix, 0, 0, anchor))
    assert trainer.model.alpha == pytest.approx(alpha, abs=1e-12)
    assert len(set(logged(trainer, "validation/anchor_accuracy"))) == 1, "the anchor is frozen, the questions the same"


def test_linear_and_cosine_reach_the_end_with_the_run(tmp_path):
    trainer = controlled(tmp_path, "linear", alpha_end=0.1)
    trainer.train()
    assert logged(trainer, "alpha")[::3] == pytest.approx([0.4, 0.325, 0.25, 0.175])
    assert trainer.model.alpha == pytest.approx(0.1)
    trainer = controlled(tmp_path, "cosine", alpha_end=0.1)
    trainer.train()
    assert logged(trainer, "alpha")[::3] == pytest.approx([0.4, 0.35607, 0.25, 0.14393], abs=1e-5)


def test_validation_does_not_touch_training(tmp_path):
    """With s3 = 0 at all counts, alpha is always 0.5, and the run matches one at a fixed 0.5 bit for bit."""
    validated = controlled(tmp_path / "a", model=mixture(alpha=0.5), adaptive_offset=0, adaptive_scale=1e30)
    validated.train()
    fixed = controlled(tmp_path / "b", "fixed", model=mixture(alpha=0.5))
    fixed.train()
    for name, value in validated.model.state_dict().items():
        assert torch.equal(value, fixed.model.state_dict()[name]), name
    assert logged(validated, "reward") == logged(fixed, "reward")
    assert logged(validated, "completions/mean_length") == logged(fixed, "completions/mean_length")


# --- which questions -------------------------------------------------------------------------------------------------


def fresh(rows=50, questions=4, size=3, seed=0, done=0, **kwargs):
    dataset = Dataset.from_dict({"prompt": [str(i) for i in range(rows)]})
    kwargs = {"repeats": 2, "passes": 3} | kwargs
    return FreshQuestions(dataset, questions, size, seed=seed, outer_steps_done=lambda: done, **kwargs)


def test_fresh_questions_are_never_trained_on_in_their_pass():
    sampler = fresh()
    assert sampler.outer_steps == 7  # 50 // (4 + 3)
    for number in range(3):
        trained_on = {str(i) for i in fresh(done=7 * number)}
        validated = [row["prompt"] for g in range(7 * number, 7 * number + 7) for row in sampler.after(g)]
        assert len(validated) == len(set(validated)) == 21
        assert len(trained_on) == 28
        assert not trained_on & set(validated)


def test_fresh_questions_stand_between_the_generations_in_order():
    """Without shuffling, as in the authors' code: 4 questions to train on, then 3 to validate on."""
    sampler = fresh(seed=None, repeats=1, passes=1)
    assert list(sampler)[:8] == [0, 1, 2, 3, 7, 8, 9, 10]
    assert [row["prompt"] for row in sampler.after(1)] == ["11", "12", "13"]
    assert [row["prompt"] for row in sampler.after(7)] == ["4", "5", "6"], "the next pass"


def test_the_order_has_the_shape_of_trls():
    order = list(fresh())
    assert len(order) == len(fresh()) == 7 * 4 * 2 * 3
    for start in range(0, len(order), 24):
        generation = order[start : start + 24]
        assert generation == generation[:8] * 3
        assert generation[0:8:2] == generation[1:8:2]
        assert len(set(generation)) == 4


def test_each_pass_has_an_order_of_its_own_that_a_resumed_run_finds():
    passes = [list(fresh(done=done)) for done in (0, 7, 14)]
    assert len({tuple(order) for order in passes}) == 3
    assert list(fresh(done=10)) == passes[1], "resumed within the second pass"


def test_a_run_on_fresh_questions_trains_on_no_validation_question_of_the_pass(tmp_path):
    """Two passes of two outer steps over 19 questions, each with 3 to train on and 6 to validate on."""
    prompts = [f"{a}{b}=" for a in "abcdefgh" for b in "0123"][:19]
    trainer = controlled(tmp_path, held_out=None, validation_size=6, train=prompts)
    asked = {"train": [], "eval": []}
    calculate = trainer._calculate_rewards

    def watched(inputs, prompts, *args):
        asked["train" if trainer.model.training else "eval"].append(set(prompts))
        return calculate(inputs, prompts, *args)

    trainer._calculate_rewards = watched
    trainer.train()
    assert [len(prompts) for prompts in asked["train"]] == [3] * 4
    assert [len(prompts) for prompts in asked["eval"]] == [6] * 4
    for first in (0, 2):
        trained_on, validated = (asked[mode][first] | asked[mode][first + 1] for mode in ("train", "eval"))
        assert len(trained_on) == 6
        assert len(validated) == 12
        assert not trained_on & validated
    assert asked["train"][0] | asked["train"][1] != asked["train"][2] | asked["train"][3]


def test_held_out_questions_are_the_first_of_the_set_each_time():
    questions = HeldOut(Dataset.from_dict({"prompt": QUESTIONS}), 4)
    assert [row["prompt"] for row in questions.after(0)] == QUESTIONS[:4]
    assert questions.after(5) == questions.after(0)


# --- resume ----------------------------------------------------------------------------------------------------------


TWO_PASSES = {"held_out": None, "validation_size": 6, "train": QUESTIONS + [question + "?" for question in QUESTIONS]}


@pytest.mark.parametrize(
    "at",
    [pytest.param(4, id="within an outer step"), pytest.param(9, id="between outer steps", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("controller", "options"),
    [("adaptive", {}), ("adaptive", TWO_PASSES), ("validation_weighted", {}), ("cosine", {"alpha_end": 0.1})],
    ids=["adaptive", "fresh questions", "validation_weighted", "cosine"],
)
def test_a_resumed_run_goes_on_with_its_alpha_and_its_questions(tmp_path, controller, options, at):
    """Bit for bit. With fresh questions a pass has two outer steps, so it resumes in the first or the second pass."""
    whole = controlled(tmp_path / "whole", controller, **options)
    whole.train()
    half = controlled(tmp_path / "half", controller, save_strategy="steps", save_steps=at, **options)
    half.train()
    checkpoint = tmp_path / f"half/checkpoint-{at}"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["alpha"]["attributes"]["alpha"] == logged(whole, "alpha")[at]
    resumed = controlled(tmp_path / "half", controller, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name in ("alpha", "reward", "validation/policy_accuracy", "validation/mixture_accuracy"):
        assert logged(resumed, name) == logged(whole, name), name
    assert resumed.model.alpha == whole.model.alpha
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_the_saved_model_has_the_alpha_in_force(tmp_path):
    trainer = controlled(tmp_path)
    trainer.train()
    trainer.save_model()
    assert LogitMixForCausalLM.from_pretrained(tmp_path).alpha == trainer.model.alpha != 0.4


# --- what is refused -------------------------------------------------------------------------------------------------


def two_anchors():
    members = [tiny_member(seed=seed) for seed in range(3)]
    return LogitMixForCausalLM.from_members(members[0], members[1:], weights=[0.5, 0.2, 0.3])


@pytest.mark.parametrize(
    ("controller", "options", "message"),
    [
        ("sometimes", {}, "alpha_controller is 'sometimes'; it must be one of 'fixed', 'adaptive'"),
        ("adaptive", {"model": tiny_member()}, "'adaptive', but there is no anchor to weigh; set anchor"),
        ("adaptive", {"model": two_anchors()}, r"mixture has weights \[0.5, 0.2, 0.3\], so only 'fixed'"),
        ("adaptive", {"validation_size": 10}, "validation_size is 10, but validation_dataset has 9 questions"),
        ("adaptive", {"validation_size": 0}, "validation_size is 0, but must be at least 1"),
        (
            "adaptive",
            {"held_out": None, "validation_size": 22},
            "the data set has 24 questions, fewer than the 3 of an outer step and the 22 of validation_size",
        ),
        (
            "adaptive",
            {"held_out": None, "validation_size": 3, "dynamic_sampling": "refill"},
            "'refill' draws from all",
        ),
        ("adaptive", {"adaptive_scale": 0}, "adaptive_scale is 0, but must be above 0"),
        ("adaptive", {"adaptive_scale": -35}, "adaptive_scale is -35"),
        ("adaptive", {"adaptive_offset": float("nan")}, "adaptive_offset nan"),
        ("adaptive", {"adaptive_scale": 0.1}, "alpha can reach 1, where the policy has no gradient"),
        ("adaptive", {"alpha_end": 0.1}, "'adaptive' and alpha_end is 0.1; alpha_end goes with linear and cosine"),
        ("linear", {}, "'linear' and alpha_end is None; alpha_end goes with linear and cosine, and is required there"),
        ("cosine", {"alpha_end": 1.0}, "alpha_end is 1.0; training needs 0 <= alpha < 1"),
        ("piecewise", {}, "alpha_points goes with piecewise"),
        ("piecewise", {"alpha_points": ["3;0.5"]}, "'3;0.5' in alpha_points is not STEP:ALPHA"),
        (
            "linear",
            {"alpha_end": 0.1, "gradient_accumulation_steps": 2},
            "steps_per_generation \\* num_iterations is 3 and gradient_accumulation_steps 2",
        ),
        ("adaptive", {"tools": [len]}, "tools cannot be used with alpha_controller 'adaptive'"),
        (
            "adaptive",
            {"held_out": ["a", "b" * 120], "validation_size": 2},
            "validation prompt 1 has 120 tokens",
        ),
    ],
)
def test_what_a_controller_could_not_do_is_refused(tmp_path, controller, options, message):
    with pytest.raises(ValueError, match=message):
        controlled(tmp_path, controller, **options)


def test_held_out_questions_that_no_controller_asks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is a validation_dataset, but alpha_controller 'fixed' validates"):
        LogitMixGRPOTrainer(
            mixture(),
            count_vowels,
            LogitMixGRPOConfig(str(tmp_path), use_cpu=True, bf16=False),
            Dataset.from_dict({"prompt": QUESTIONS}),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS * 8}),
            processing_class=character_tokenizer(),
        )


# --- several processes -----------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.training.test_alpha_validation import QUESTIONS, controlled, logged, validate

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
results = {}
for size in (9, 1):
    trainer = controlled(folder, validation_size=size, per_device_train_batch_size=2, max_steps=6)
    rows = [{"prompt": question} for question in QUESTIONS[:size]]
    results[f"counts of {size}"] = vars(validate(trainer, rows, 0.4, with_anchor=True))
    trainer.train()
    results[f"alpha after {size}"] = trainer.model.alpha
(folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(results))
"""


@pytest.mark.slow
def test_two_processes_share_the_questions_and_have_one_alpha(tmp_path):
    """Nine questions, and then one, which leaves the second process without its own question."""
    run_two_processes(SCRIPT, tmp_path)
    first, second = (json.loads((tmp_path / "run" / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    trainer = controlled(tmp_path)
    for size in (9, 1):
        rows = [{"prompt": question} for question in QUESTIONS[:size]]
        assert first[f"counts of {size}"] == vars(validate(trainer, rows, 0.4, with_anchor=True))
        assert first[f"alpha after {size}"] != 0.4
