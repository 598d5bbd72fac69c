"""Every option of the trainer is read, or refused where nothing reads it; docs/training.md lists all of them."""

import re
from dataclasses import MISSING, fields

import pytest

from logitmix.cli.__main__ import main
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.config_checks import validate_options
from logitmix.training.option_readers import NEVER_READ, READERS
from logitmix.training.sampling_checks import NEUTRAL
from tests.helpers.commands import TINY, error_of, save_member
from tests.helpers.grpo import trainer_of
from tests.helpers.members import character_tokenizer
from tests.helpers.paths import ROOT

OPTIONS = {field.name: field for field in fields(LogitMixGRPOConfig)}
OTHER_VALUES = {
    "anchor_dtype": "bfloat16",
    "decoding": "joint",
    "reanchor_to": "merged",
    "epsilon": 0.1, "anchor_states": "offload", "cache_implementation": "static", "rollout_batch_size": 4,
    "vllm_mode": "server", "vllm_model_impl": "transformers", "vllm_server_base_url": "http://localhost",
    "vllm_importance_sampling_mode": "token_mask", "metric_for_best_model": "reward", "greater_is_better": True,
    "train_sampling_strategy": "sequential", "label_names": ["labels"], "include_for_metrics": ["loss"],
    "length_column_name": "size", "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "liger_kernel_config": {"rope": True}, "transformers_continuous_batching_config": {"max_memory_percent": 0.1},
    "vllm_importance_sampling_clip_min": 1.0,
    "optim_target_modules": "all-linear", "load_best_model_at_end": True, "vllm_server_host": "localhost",
}  # fmt: skip
# the others of the configuration that a test of one option needs, for it to be unread
CONTEXT = {
    "epsilon": {"loss_type": "sapo"},
    "epsilon_high": {"loss_type": "vespo"},
    "load_best_model_at_end": {"save_strategy": "no"},
    "delta": {"loss_type": "cispo"},
    "anchor_states": {"loss_head": "reference"},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": False},
    "rollout_batch_size": {"use_transformers_continuous_batching": True},
    "cache_implementation": {"use_transformers_continuous_batching": True},
    "decoding": {"use_transformers_continuous_batching": True},
}


def other_value(option):
    if option in OTHER_VALUES:
        return OTHER_VALUES[option]
    default = OPTIONS[option].default
    if isinstance(default, bool):
        return not default
    return 3 if default in (None, MISSING) else default + 1


def config(**options):
    return LogitMixGRPOConfig("run", use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("option", [*NEVER_READ, *(option for reader in READERS for option in reader.options)])
@pytest.mark.filterwarnings("ignore:The `vllm_importance")
def test_an_option_that_nothing_reads_is_refused(option):
    args = config(**CONTEXT.get(option, {}), **{option: other_value(option)})
    with pytest.raises(ValueError, match=f"{option} is .*nothing would read it"):
        validate_options(args)


def test_the_defaults_are_accepted():
    validate_options(config())


def test_best_checkpoints_need_an_evaluation(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"save_strategy is 'best'.*no checkpoint would be saved"):
        trainer_of(tmp_path, save_strategy="best", metric_for_best_model="reward")
    model = save_member(tmp_path / "model", seed=0)
    flags = ["--save_strategy", "best", "--metric_for_best_model", "reward", "--output_dir", str(tmp_path / "run")]
    assert "save_strategy is 'best'" in error_of(capsys, ["train", "--model_name_or_path", model, *TINY[:-2], *flags])


def test_an_evaluation_holds_all_completions_of_a_question(tmp_path):
    with pytest.raises(ValueError, match=r"is 8, which the 3 completions .*num_generations_eval"):
        trainer_of(tmp_path, num_generations_eval=3)
    trainer_of(tmp_path, num_generations_eval=2)


def test_a_limit_on_tool_calls_needs_tools(tmp_path):
    with pytest.raises(ValueError, match="max_tool_calling_iterations is 3"):
        trainer_of(tmp_path, max_tool_calling_iterations=3)


def test_a_reward_of_none_from_every_function_stops_the_run(tmp_path):
    trainer = trainer_of(tmp_path, reward=lambda completions, **_: [None] * len(completions))
    with pytest.raises(FloatingPointError, match="None or NaN"):
        trainer.train()


CHAT = [{"role": "user", "content": "ab="}]
PART = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]


@pytest.mark.parametrize("row", [{"image": "x"}, {"images": ["x"]}, {"images": None}, {"prompt": PART}])
def test_an_image_is_refused_where_the_policy_reads_text(tmp_path, row):
    rows, tokenizer = [{"prompt": CHAT} | row] * 12, character_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(ValueError, match="row 0 has an image, but the policy reads text only"):
        trainer_of(tmp_path, rows=rows, tokenizer=tokenizer)


def saved_run(tmp_path, **options):
    trainer = trainer_of(tmp_path / "run", save_strategy="steps", save_steps=1, save_only_model=True, **options)
    trainer.train()
    return str(tmp_path / "run" / "checkpoint-1")


def test_a_checkpoint_without_its_optimizer_is_resumed_only_by_name(tmp_path):
    checkpoint = saved_run(tmp_path)
    for source in (checkpoint, True):
        with pytest.raises(ValueError, match=r"no optimizer and schedule.*resume_without_optimizer"):
            trainer_of(tmp_path / "run", max_steps=3).train(resume_from_checkpoint=source)
    trainer = trainer_of(tmp_path / "run", max_steps=3, resume_without_optimizer=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_the_commands_resume_without_the_optimizer_only_by_name(tmp_path, capsys, verb):
    model = save_member(tmp_path / "model", seed=0)
    flags = ["--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--train_limit", "64", "--save_steps", "1"]
    if verb == "train":
        flags += ["--max_completion_length", "8", "--per_device_train_batch_size", "16", "--num_generations", "4"]
    command = [verb, "--model_name_or_path", model, *flags, "--output_dir", str(tmp_path / "run"), "--max_steps"]
    assert main([*command, "1", "--save_only_model", "true"]) == 0
    resumed = [*command, "2", "--save_only_model", "true", "--resume_from_checkpoint", "true"]
    assert "resume_without_optimizer" in error_of(capsys, resumed)
    assert main([*resumed, "--resume_without_optimizer", "true"]) == 0


def documented():
    """The options of the table in docs/training.md by the kind of their row."""
    text = (ROOT / "docs" / "training.md").read_text().partition("\n## Every option")[2].partition("\n## ")[0]
    rows = re.findall(
        r"^\| (works|refused|with another|never|read elsewhere|without effect)[^|]*\|([^|]*)\|", text, re.MULTILINE
    )
    return {option: kind for kind, options in rows for option in re.findall(r"`(\w+)`", options)}, text


def test_the_docs_list_every_option_once():
    kinds, text = documented()
    assert set(kinds) == set(OPTIONS)
    listed = re.findall(r"^\| [a-z ]+[^|]*\|([^|]*)\|", text, re.MULTILINE)
    names = [name for options in listed for name in re.findall(r"`(\w+)`", options)]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


def test_the_docs_say_of_an_option_what_the_checks_do():
    kinds, _ = documented()
    assert {option for option, kind in kinds.items() if kind == "never"} == set(NEVER_READ)
    with_others = {option for reader in READERS for option in reader.options}
    with_others |= {"max_tool_calling_iterations", "log_completions_hub_repo"}  # by the trainer's arguments, by TRL
    assert {option for option, kind in kinds.items() if kind == "with another"} == with_others
    assert {option for option, kind in kinds.items() if kind == "refused"} >= set(NEUTRAL)
