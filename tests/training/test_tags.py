"""A template whose tags are special tokens, and a tokenizer that appends EOS, in training, evaluation and SFT."""

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken
from transformers import AutoTokenizer

from logitmix.cli.__main__ import main
from logitmix.evaluation.decode import greedy_responses
from logitmix.mixture.generation import GREEDY, generate_completions
from logitmix.mixture.loading import require_tokenizer
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.tokenizers import keep_tags
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.tasks import R1, load_task
from logitmix.training.alpha.validation import validate
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.grpo import LogitMixGRPOTrainer
from logitmix.training.rollouts.vllm import sampling_parameters
from logitmix.training.task_trainer import build_trainer
from tests.helpers.grpo import count_vowels, mixture, trainer_of
from tests.helpers.members import character_tokenizer as member_tokenizer
from tests.mixture.test_tokenizers import PARTS, RAISES, TAGS, with_post_processor

CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy and an anchor whose tokenizer has the tags of `r1` as special tokens."""
    root = tmp_path_factory.mktemp("tagged")
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.add_special_tokens({"extra_special_tokens": TAGS})
    for seed, name in enumerate(("base", "sft")):
        torch.manual_seed(seed)
        tiny_model(len(tokenizer)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return str(root / "base"), str(root / "sft")


@pytest.fixture
def task():
    return load_task("arithmetic", template="r1")


def perfect_ids(tokenizer, task, problem):
    ids = tokenizer(R1.completion("", problem.answer), add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def test_perfect_rollouts_earn_their_reward_and_the_saved_tokenizer_keeps_the_tags(folders, task, tmp_path):
    problems = task.problems("train", 4)
    args = LogitMixGRPOConfig(
        str(tmp_path), anchor=folders[1], use_cpu=True, bf16=False, report_to=[], num_generations=4, max_steps=1,
        per_device_train_batch_size=4, max_completion_length=16, logging_steps=1,
    )  # fmt: skip
    trainer = build_trainer(task, problems, folders[0], args)
    gold = {task.prompt(problem): problem for problem in problems}

    def answer(prompt_ids, *_):
        prompts = trainer.processing_class.batch_decode(prompt_ids)
        return [perfect_ids(trainer.processing_class, task, gold[prompt]) for prompt in prompts]

    trainer.sample = lambda prompt_ids, *_: (answer(prompt_ids), None)
    trainer.decode_greedy = answer
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["format_rate"] == log["answer_rate"] == log["reward"] == 1
    counts = validate(trainer, [dict(row) for row in trainer.train_dataset][:2], alpha=0.5, with_anchor=True)
    assert (counts.policy, counts.mixture, counts.anchor) == (2, 2, 2)
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = perfect_ids(tokenizer, task, problems[0])
        assert R1.is_formatted(tokenizer.decode(ids, skip_special_tokens=True)), folder


def test_perfect_responses_of_an_evaluation_are_right(folders, task, monkeypatch):
    problems = task.problems("test", 2)
    tokenizer = require_tokenizer(folders[0])
    model = LogitMixForCausalLM.from_members(*folders, alpha=0.5)
    monkeypatch.setattr(
        "logitmix.evaluation.decode.generate_completions",
        lambda model, tokenizer, prompt_ids, *_, **__: [
            perfect_ids(tokenizer, task, problem) for problem, _ in zip(problems, prompt_ids, strict=True)
        ],
    )
    responses = greedy_responses(model, tokenizer, task, problems, {"mixture": 0.5})
    assert all(response.answer_ok and not response.truncated for response in responses)


def test_a_response_stops_at_a_stop_string_that_is_a_special_token(folders, task):
    tokenizer = require_tokenizer(folders[0])
    model = LogitMixForCausalLM.from_members(*folders, alpha=0.5)
    end = tokenizer.convert_tokens_to_ids("</answer>")
    settings = GREEDY | {"max_new_tokens": 6, "sequence_bias": [[[end], 1e4]]}
    for prepare in (lambda: None, lambda: keep_tags(tokenizer, R1)):
        prepare()
        assert generate_completions(model, tokenizer, [[5, 6]], settings, R1.stop) == [[end]]


def test_the_sft_command_saves_a_tokenizer_that_keeps_the_tags(folders, tmp_path):
    assert main([
        "sft", "--model_name_or_path", folders[0], "--output_dir", str(tmp_path / "sft"), "--task", "arithmetic",
        "--template", "r1", "--train_limit", "8", "--bf16", "false", "--use_cpu", "true", "--report_to", "none",
        "--max_steps", "1",
    ]) == 0  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft")
    ids = tokenizer(R1.completion("1+1=2", "2"))["input_ids"]
    assert R1.is_formatted(tokenizer.decode(ids, skip_special_tokens=True))


def test_vllm_searches_special_tokens_for_stop_strings_that_contain_them():
    assert sampling_parameters(None, ["</answer>"], [2], ["</answer>"])["skip_special_tokens"] is False
    assert "skip_special_tokens" not in sampling_parameters(None, ["\n"], [2], ["</answer>"])


@pytest.mark.parametrize("command", ["train", "sft", "eval"])
def test_the_commands_refuse_a_tokenizer_that_loses_the_template(command, tmp_path, capsys):
    tokenizer = character_tokenizer(CHARACTERS)
    # a token that swallows the space after it
    tokenizer.add_tokens([AddedToken("</think>", rstrip=True, normalized=False)])
    torch.manual_seed(0)
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--task", "arithmetic", "--template", "r1"]
    if command != "eval":
        arguments += ["--output_dir", str(tmp_path / "run"), "--bf16", "false", "--use_cpu", "true"]
    assert main([command, *arguments]) == 2
    assert "does not keep ' </think> <answer>' of the template 'r1'" in capsys.readouterr().err


# --- EOS after prompts, and chat templates, in a trainer of your own data ---------------------------------------


@pytest.mark.filterwarnings("ignore:the tokenizer of .* appends")
def test_prompts_of_a_trainer_do_not_end_in_eos(tmp_path):
    trainer = LogitMixGRPOTrainer(
        mixture(),
        reward_funcs=count_vowels,
        args=LogitMixGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], num_generations=2,
                                per_device_train_batch_size=2, max_completion_length=4),
        train_dataset=Dataset.from_dict({"prompt": ["ab=", "1+2="]}),
        processing_class=with_post_processor("<bos> $A <eos>"),
    )  # fmt: skip
    plain = member_tokenizer()
    assert trainer.tokenize_prompts(["ab="]) == [[1, *plain("ab=")["input_ids"]]]


@pytest.mark.parametrize(
    ("template", "reason"),
    [(RAISES, "cannot render the messages"), (PARTS, "leaves out the text of a user's message")],
)
def test_a_trainer_refuses_chats_that_the_chat_template_does_not_render(template, reason, tmp_path, monkeypatch):
    from tests.helpers import grpo

    tokenizer = member_tokenizer()
    tokenizer.chat_template = template
    monkeypatch.setattr(grpo, "character_tokenizer", lambda: tokenizer)
    chat = [{"role": "user", "content": "ab="}]
    with pytest.raises(ValueError, match=reason):
        trainer_of(tmp_path, prompts=[chat])
    trainer_of(tmp_path, prompts=["ab="])
    if template is PARTS:
        parts = [{"role": "user", "content": [{"type": "text", "text": "ab="}]}]
        trainer = trainer_of(tmp_path, prompts=[parts])
        assert "ab=" in tokenizer.decode(trainer.tokenize_prompts([parts])[0])
