"""The trainer with rollouts in vLLM."""

import functools
import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config
from trl.generation import vllm_generation
from vllm import LLM

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.frozen.by_reference import save_by_reference
from logitmix.mixture.generation import GREEDY
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.rollouts import vllm as rollouts
from logitmix.training.rollouts.vllm import sampling_parameters, validate_architectures
from tests.helpers import grpo
from tests.helpers.adapters import save_adapter
from tests.helpers.commands import TINY
from tests.helpers.engines import IS_INTERPRETED, SLOW_ON_SECOND_RUNNER, clean_up, slow_on_second_runner
from tests.helpers.grpo import PROMPTS, trainer_of
from tests.helpers.members import CHARACTERS, character_tokenizer
from tests.helpers.tools import ANSWER, CALL, RESULT, add, tool_mixture, tool_tokenizer, tool_user
from tests.helpers.vllm_members import build_member, build_mixture, save_member


@pytest.fixture(autouse=True)
def exact_engine(monkeypatch):
    """Run TRL's engine in float32, which is not vLLM's default, and without the slow compilation."""
    monkeypatch.setattr(
        vllm_generation, "LLM", functools.partial(LLM, dtype="float32", enforce_eager=True, disable_log_stats=True)
    )
    yield
    clean_up()


# the command line with an engine as in `exact_engine`
COMMAND_LINE = """
import functools, sys
from trl.generation import vllm_generation
from vllm import LLM
vllm_generation.LLM = functools.partial(LLM, dtype="float32", enforce_eager=True)
from logitmix.cli.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def trainer_in_vllm(path, model, **kwargs):
    options = {"vllm_max_model_length": 64, "max_steps": 3, "temperature": 0.8, "learning_rate": 1e-3}
    return trainer_of(path, model, **{"use_vllm": True, "vllm_mode": "colocate"} | options | kwargs)


def build_kind(path, kind):
    """A mixture of two full models, of which one may have tied embeddings, of two adapters, or of one and its base."""
    if kind == "two models":
        return build_mixture("qwen2", "llama", alpha=0.4)
    if kind == "tied embeddings":
        tied = build_member("qwen2", tie_word_embeddings=True)
        return LogitMixForCausalLM.from_members(tied, build_member("llama", 1), alpha=0.4)
    base = save_member(path / "base")
    anchor = base if kind == "base anchor" else save_adapter(path / "anchor", base, 2, r=6)
    return LogitMixForCausalLM.from_members(save_adapter(path / "policy", base, 1), anchor, alpha=0.4, dtype="float32")


def largest_difference(trainer, alpha=None):
    """The largest difference between vLLM's log-probability of a sampled token and the trainer's."""
    prompt_ids = trainer.processing_class(PROMPTS * 2)["input_ids"]
    completions, log_probs = trainer._generate_single_turn(prompt_ids, None, {}, 2)
    largest = 0.0
    for prompt, completion, in_vllm in zip(prompt_ids, completions, log_probs, strict=True):
        ids = torch.tensor([prompt + list(completion)])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            scored, _ = trainer.model.score(ids, torch.ones_like(ids), labels, trainer.temperature)
        largest = max(largest, (scored[0, len(prompt) - 1 :] - torch.tensor(in_vllm)).abs().max().item())
    return largest


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("two models", marks=pytest.mark.runners),
        pytest.param("base anchor", marks=[pytest.mark.runners, *SLOW_ON_SECOND_RUNNER]),
        "two adapters",
        "tied embeddings",
    ],
)
def test_the_trainers_log_probs_match_those_of_vllms_samples(tmp_path, kind, monkeypatch):
    model = build_kind(tmp_path, kind)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = trainer_in_vllm(tmp_path / "run", model, max_steps=2, max_completion_length=4 if IS_INTERPRETED else 9)
    assert not (tmp_path / "run" / ".vllm").exists()
    pushed: list[str] = []
    named_weights = type(trainer.vllm_generation).named_weights

    def recorded(self):
        for name, parameter in named_weights(self):
            pushed.append(name)
            yield name, parameter

    monkeypatch.setattr(type(trainer.vllm_generation), "named_weights", recorded)
    assert largest_difference(trainer) < 1e-4
    trainer.train()
    for alpha in (0.4, 0.1):
        model.alpha = alpha
        assert largest_difference(trainer) < 1e-4
    assert {name.removeprefix("policy.") for name in pushed} == {
        name for name, p in model.policy.named_parameters() if p.requires_grad
    }
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
    # weights that were not pushed show as a difference
    with torch.no_grad():
        for parameter in model.policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    assert largest_difference(trainer) > 0.05
    trainer.vllm_generation.sync_weights()
    assert largest_difference(trainer) < 1e-4


@pytest.mark.parametrize(
    "kind", [pytest.param("full models", marks=[pytest.mark.runners, *SLOW_ON_SECOND_RUNNER]), "two adapters"]
)
def test_anchors_are_read_from_their_own_folders(tmp_path, kind, monkeypatch):
    """Only what trains is written for vLLM, and vLLM still has the anchor's weights."""
    policy, anchor = save_member(tmp_path / "base"), save_member(tmp_path / "sft", "llama", 1)
    if kind == "two adapters":
        policy, anchor = (save_adapter(tmp_path / name, policy, seed) for seed, name in enumerate(("p", "a"), 1))
    model = LogitMixForCausalLM.from_members(policy, anchor, alpha=0.4, dtype="float32")
    written = []

    def recorded(mixture, folder):
        save_by_reference(mixture, folder)
        written.extend(path.stat().st_size for path in folder.glob("*.safetensors"))

    monkeypatch.setattr(rollouts, "save_by_reference", recorded)
    trainer = trainer_in_vllm(tmp_path / "run", model)
    assert largest_difference(trainer) < 1e-4
    (size,) = written
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert trained <= size < trained + 10_000


def near_pair():
    """A mixture that accepts most drafts."""
    policy, anchor = build_member("qwen2"), build_member("qwen2")
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in anchor.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    return LogitMixForCausalLM.from_members(policy, anchor, alpha=0.4)


@pytest.mark.runners
@slow_on_second_runner
def test_members_take_turns_in_rollouts_and_log_their_passes_and_acceptance(tmp_path):
    """By default on a CPU. A push of the weights leaves no stale logits."""
    trainer = trainer_in_vllm(tmp_path, near_pair(), max_completion_length=16, learning_rate=1e-4)
    trainer.train()
    for line in trainer.state.log_history[:3]:
        assert 0.5 < line["decoding/acceptance"] <= 1
        assert 1 < line["decoding/passes_per_token"] < 1.9  # two of them for the prompt
    assert largest_difference(trainer) < 1e-4
    counted = trainer.monitor.decoding.tokens
    trainer.decode_greedy(trainer.processing_class(PROMPTS)["input_ids"], [0.0, 0.4, 1.0])
    assert trainer.monitor.decoding.tokens == counted


def test_joint_rollouts_log_no_drafts(tmp_path):
    trainer = trainer_in_vllm(tmp_path, near_pair(), decoding="joint", max_steps=1)
    trainer.train()
    assert not [key for key in trainer.state.log_history[0] if key.startswith("decoding/")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vllm_tensor_parallel_size": 2}, "cannot be used with vllm_tensor_parallel_size 2; set decoding to 'joint'"),
        ({"vllm_enable_sleep_mode": True}, "cannot be used with vllm_enable_sleep_mode; set decoding to 'joint'"),
        ({"vllm_mode": "server"}, "decoding is 'alternating', but nothing would read it: .*vllm_mode 'colocate'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_alternating_rollouts_that_vllm_cannot_decode_are_rejected(tmp_path, options, message):
    mixture = build_mixture("qwen2", "llama")
    with pytest.raises(ValueError, match=message):
        trainer_in_vllm(tmp_path, mixture, **{"decoding": "alternating"} | options)


def test_validation_decodes_several_alphas_in_one_batch_or_in_one_each(tmp_path, monkeypatch):
    model = build_mixture("qwen2", "llama", alpha=0.4)
    trainer = trainer_in_vllm(tmp_path, model, stop_strings=["e"])
    trainer.train()
    prompt_ids = trainer.processing_class(PROMPTS)["input_ids"] * 3
    alphas = [0.0] * 3 + [0.4] * 3 + [1.0] * 3
    expected = trainer.decode(prompt_ids, GREEDY | {"max_new_tokens": trainer.max_completion_length}, alphas)
    assert trainer.decode_greedy(prompt_ids, alphas) == expected
    assert len({len(ids) for ids in expected}) > 1  # some ended at the stop string
    generation = type(trainer.vllm_generation)  # as with a server, tensor parallelism or sleep mode
    monkeypatch.setattr(generation, "_generate_one_batch", generation._generate_by_alpha)
    assert trainer.decode_greedy(prompt_ids, alphas) == expected


def test_an_adaptive_alpha_validates_in_vllm(tmp_path):
    trainer = trainer_in_vllm(
        tmp_path,
        build_mixture("qwen2", "llama", alpha=0.4),
        alpha_controller="adaptive",
        validation_size=4,
        adaptive_offset=1.0,
        adaptive_scale=2.0,
        prompts=PROMPTS * 4,
    )
    trainer.train()
    assert all("validation/s3" in line for line in trainer.state.log_history[:3])
    assert largest_difference(trainer) < 1e-4


def test_tools_are_called_and_exactly_their_tokens_are_masked(tmp_path):
    """TRL's importance correction also leaves them out: both sides scored the policy's own tokens alike."""
    tokenizer = tool_tokenizer()
    prompts = [[{"role": "user", "content": "3+4"}]]
    trainer = trainer_in_vllm(
        tmp_path, tool_mixture(tool_user(tokenizer)), prompts=prompts, tokenizer=tokenizer, tools=[add],
        reward=lambda completions, **_: [float(i) for i in range(len(completions))],
        vllm_max_model_length=1200, max_completion_length=200, per_device_train_batch_size=4, temperature=0.2,
        max_steps=1,
    )  # fmt: skip
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)
    called = 0
    for ids, mask, own in zip(batch["completion_ids"], batch["completion_mask"], batch["tool_mask"], strict=True):
        ids, own = ids[mask.bool()], own[mask.bool()].bool()
        if tokenizer.decode(ids) == CALL + RESULT + ANSWER:
            assert tokenizer.decode(ids[~own]) == RESULT
            called += 1
    assert called >= 2
    own = (batch["completion_mask"] * batch["tool_mask"]).bool()
    gap = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[own]
    assert gap.abs().max() < 1e-3
    trainer.train()
    assert trainer.state.log_history[0]["tools/call_frequency"] >= 0.5


def test_stop_strings_and_eos_tokens_become_vllms_sampling_parameters():
    assert sampling_parameters({"min_new_tokens": 3, "seed": 1}, ["\n"], [2]) == {
        "min_tokens": 3,
        "seed": 1,
        "stop": ["\n"],
        "include_stop_str_in_output": True,
        "stop_token_ids": [2],
    }
    assert sampling_parameters(None, [], [2, 5]) == {"stop_token_ids": [2, 5]}


def test_a_stop_string_that_is_a_special_token_ends_a_rollout(tmp_path, monkeypatch):
    tokenizer = character_tokenizer(CHARACTERS[:-1])
    tokenizer.add_special_tokens({"extra_special_tokens": ["</answer>"]})
    monkeypatch.setattr(grpo, "character_tokenizer", lambda: tokenizer)
    end = tokenizer.convert_tokens_to_ids("</answer>")
    mixture = build_mixture("qwen2", "llama")
    mixture.tokenizer = tokenizer
    trainer = trainer_in_vllm(tmp_path, mixture, stop_strings=["</answer>"], decoding="joint")
    trainer.vllm_generation.generation_kwargs |= {"logit_bias": {end: 100.0}}  # the trainer itself refuses it
    completions, _ = trainer.sample(tokenizer(PROMPTS)["input_ids"], None, {}, 1)
    assert [list(completion) for completion in completions] == [[end]] * len(PROMPTS)


@pytest.mark.runners
@slow_on_second_runner
def test_all_weights_are_pushed_after_sleep_level_2(tmp_path):
    """Level 2 discards all weights. vLLM's CPU build cannot sleep, so the test overwrites them."""
    trainer = trainer_in_vllm(tmp_path, build_mixture("qwen2", "llama", alpha=0.4))
    generation = trainer.vllm_generation
    with torch.no_grad():
        for parameter in generation.llm.llm_engine.model_executor.driver_worker.model_runner.model.parameters():
            parameter.zero_()
    generation.sync_weights()  # of the policy only
    assert largest_difference(trainer) > 0.05
    generation._llm_weights_sleeping = True
    generation.sync_weights()
    assert largest_difference(trainer) < 1e-4


@pytest.mark.slow
def test_train_and_a_resumed_run_from_the_command_line(tmp_path):
    members = ["--model_name_or_path", save_member(tmp_path / "base"), "--anchor"]
    members += [save_member(tmp_path / "sft", "llama", 1), "--output_dir", str(tmp_path / "run")]
    command = ["train", *members, *TINY[:-2], "--use_vllm", "true", "--vllm_mode", "colocate", "--save_steps", "1"]
    for flags in (["--max_steps", "1"], ["--max_steps", "2", "--resume_from_checkpoint", "true"]):
        # each run in its own process, since vLLM's state of the first would disturb the second
        done = subprocess.run([sys.executable, "-c", COMMAND_LINE, *command, *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    key = "sampling/sampling_logp_difference/max"  # between the log-probabilities of vLLM and of the trainer
    found = {line["step"]: line[key] for line in lines if key in line}
    assert found.keys() == {1, 2}, lines
    assert max(found.values()) < 1e-4
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "run"), LogitMixForCausalLM)


def test_members_whose_classes_vllm_would_patch_are_rejected():
    config = LogitMixConfig.from_member_configs([Qwen2Config(), GPTNeoXConfig()])
    with pytest.raises(
        ValueError, match="anchor_0 is a GPTNeoXForCausalLM, which vLLM runs through transformers' own classes"
    ):
        validate_architectures(config)
    validate_architectures(LogitMixConfig.from_member_configs([Qwen2Config(), LlamaConfig()]))
