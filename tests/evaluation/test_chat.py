"""Conversational prompts: rendering, the end of a turn, and the commands with the `boxed` template."""

import json
import string

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from logitmix.cli.__main__ import main
from logitmix.evaluation.decode import greedy_responses
from logitmix.mixture.generation import get_eos_token_ids, tokenize_prompts
from logitmix.mixture.tokenizers import get_end_of_turn_token_id
from logitmix.paper.tiny_model import EOS, PAD, character_tokenizer, tiny_model
from logitmix.tasks import load_task
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.sft import sft_dataset
from logitmix.training.task_trainer import build_trainer
from tests.helpers.paths import SHARED

START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<empty>{% endif %}{% endif %}"
)
NO_THINKING = {"enable_thinking": False}
NO_THINKING_FLAG = ["--chat_template_kwargs", json.dumps(NO_THINKING)]
TOKENIZER = SHARED / "tokenizers" / "qwen2.5"


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer whose EOS token does not end a turn, as in Qwen2.5's base models."""
    tokenizer = character_tokenizer("".join(sorted(set(string.printable) - set("\t\r\x0b\x0c"))))
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    tokenizer.chat_template = CHATML
    return tokenizer


def member(tokenizer, seed=0):
    torch.manual_seed(seed)
    return tiny_model(len(tokenizer))


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    for seed, name in enumerate(("base", "sft")):
        member(tokenizer, seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return str(root / "base"), str(root / "sft")


def test_a_prompt_of_messages_is_rendered_up_to_the_assistants_turn(tokenizer):
    task = load_task("arithmetic", template="boxed")
    problems = task.problems("test", 2)
    (first, _) = tokenize_prompts(tokenizer, [task.prompt(problem) for problem in problems])
    content = task.template.prompt_format.format(question=problems[0].question)
    assert tokenizer.decode(first) == f"{START}user\n{content}{END}\n{START}assistant\n"


def test_the_end_of_turn_token_ends_a_completion_like_eos(tokenizer):
    model = member(tokenizer)
    assert get_end_of_turn_token_id(tokenizer) == tokenizer.convert_tokens_to_ids(END)
    assert {tokenizer.convert_tokens_to_ids(t) for t in (END, EOS)} == set(get_eos_token_ids(model, tokenizer))
    plain = character_tokenizer("abc")
    assert get_end_of_turn_token_id(plain) is None
    assert PAD not in plain.decode(get_eos_token_ids(model, plain))


@pytest.mark.skipif(not TOKENIZER.exists(), reason=f"the Qwen2.5 tokenizer is not at {TOKENIZER}")
def test_qwens_turn_ends_in_im_end():
    from transformers import AutoTokenizer

    qwen = AutoTokenizer.from_pretrained(TOKENIZER)
    assert qwen.decode([get_end_of_turn_token_id(qwen)]) == END


def test_lengths_of_sft_rows_match_trls_tokenization(tokenizer, tmp_path):
    rows = load_task("arithmetic", template="boxed").demonstrations(4)
    dataset, dropped = sft_dataset(rows, tokenizer, max_length=None)
    args = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=None, gradient_checkpointing=False
    )
    trainer = SFTTrainer(member(tokenizer), args=args, train_dataset=dataset, processing_class=tokenizer)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert dropped == 0
    text = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert text.endswith(f"{START}assistant\n{rows[0]['completion'][0]['content']}{END}\n")
    _, dropped = sft_dataset(rows, tokenizer, max_length=max(lengths) - 1)
    assert dropped == lengths.count(max(lengths))


def test_evaluation_renders_the_chat_and_records_the_prompt(tokenizer):
    task = load_task("arithmetic", template="boxed")
    (response,) = greedy_responses(
        member(tokenizer), tokenizer, task, task.problems("test", 1), {"model": None}, max_new_tokens=4
    )
    assert response.prompt.startswith(f"{START}user\n")
    assert response.prompt.endswith(f"{START}assistant\n")


def test_rollouts_end_at_the_end_of_turn_token(folders, tokenizer, tmp_path):
    task = load_task("arithmetic", template="boxed")
    args = LogitMixGRPOConfig(
        str(tmp_path), anchor=folders[1], use_cpu=True, bf16=False, report_to=[], num_generations=4,
        per_device_train_batch_size=4, max_completion_length=8,
    )  # fmt: skip
    trainer = build_trainer(task, task.problems("train", 4), folders[0], args)
    assert tokenizer.convert_tokens_to_ids(END) in trainer.eos_token_ids
    assert trainer.generation_kwargs["eos_token_id"] == trainer.eos_token_ids


QUIET = ["--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no", "--max_steps", "1"]
BOXED = ["--task", "arithmetic", "--template", "boxed", "--train_limit", "16"]


def test_the_commands_accept_the_boxed_template(folders, tmp_path):
    base, sft = folders
    assert main(["sft", "--model_name_or_path", base, "--output_dir", str(tmp_path / "sft"), *BOXED, *QUIET]) == 0
    assert main([
        "train", "--model_name_or_path", base, "--anchor", sft, "--output_dir", str(tmp_path / "run"), *BOXED, *QUIET,
        "--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", "8",
        "--logging_steps", "1",
    ]) == 0  # fmt: skip
    log = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert log["format_rate"] == 0
    assert main([
        "eval", "--model_name_or_path", str(tmp_path / "run"), *BOXED[:4], "--eval_limit", "2", "--max_new_tokens",
        "4", "--output_dir", str(tmp_path / "eval"),
    ]) == 0  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "eval" / "responses.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["policy"] * 2 + ["anchor"] * 2 + ["mixture"] * 2


def test_chat_template_kwargs_reach_every_prompt(tokenizer):
    task = load_task("arithmetic", template="boxed")
    task.chat_template_kwargs = NO_THINKING
    (problem,) = problems = task.problems("test", 1)
    (ids,) = tokenize_prompts(tokenizer, [task.prompt(problem)], NO_THINKING)
    assert tokenizer.decode(ids).endswith(f"{START}assistant\n<empty>")
    (response,) = greedy_responses(member(tokenizer), tokenizer, task, problems, {"model": None}, max_new_tokens=4)
    assert response.prompt == tokenizer.decode(ids)
    (row,) = task.demonstrations(1)
    assert row["chat_template_kwargs"] == NO_THINKING, "TRL's column"


def test_a_run_is_evaluated_with_the_chat_template_kwargs_of_its_training(folders, tmp_path, capsys):
    base, sft = folders
    run, sizes = str(tmp_path / "run"), ["--max_completion_length", "4", "--logging_steps", "1", "--eval_limit", "1"]
    assert main([
        "train", "--model_name_or_path", base, "--anchor", sft, "--output_dir", run, *BOXED, *QUIET, *sizes,
        "--per_device_train_batch_size", "4", "--num_generations", "2", "--eval_every", "1", *NO_THINKING_FLAG,
    ]) == 0  # fmt: skip
    evaluated = (tmp_path / "run" / "evaluation_responses.jsonl").read_text().splitlines()
    assert all(json.loads(line)["prompt"].endswith("assistant\n<empty>") for line in evaluated)
    for flags, expected in (([], True), (["--chat_template_kwargs", "{}"], False)):
        out = tmp_path / f"eval-{expected}"
        assert main(["eval", "--model_name_or_path", run, "--eval_limit", "1", "--max_new_tokens", "2", *flags,
                     "--output_dir", str(out)]) == 0  # fmt: skip
        rows = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
        assert {row["prompt"].endswith("<empty>") for row in rows} == {expected}


def test_a_distillation_is_reported_with_its_chat_template_kwargs(folders, tmp_path):
    base, sft = folders
    assert main([
        "distill", base, "--anchor", sft, "--output_dir", str(tmp_path), *BOXED, *QUIET, "--eval_limit", "20",
        "--per_device_train_batch_size", "2", "--max_completion_length", "2", *NO_THINKING_FLAG,
    ]) == 0  # fmt: skip
    rows = (tmp_path / "report" / "responses.jsonl").read_text().splitlines()
    assert all(json.loads(row)["prompt"].endswith("<empty>") for row in rows)


def test_sft_trains_on_chats_rendered_with_its_chat_template_kwargs(folders, tokenizer, tmp_path):
    task = load_task("arithmetic", template="boxed")
    task.chat_template_kwargs = NO_THINKING
    dataset, _ = sft_dataset(task.demonstrations(2), tokenizer, max_length=None)
    assert dataset["chat_template_kwargs"][:] == [NO_THINKING] * 2
    flags = ["--model_name_or_path", folders[0], "--output_dir", str(tmp_path / "sft"), *BOXED, *QUIET]
    assert main(["sft", *flags, *NO_THINKING_FLAG]) == 0
    start = json.loads((tmp_path / "sft" / "run.jsonl").read_text().splitlines()[0])
    assert start["arguments"]["chat_template_kwargs"] == NO_THINKING


@pytest.mark.parametrize("command", ["sft", "train", "eval"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (['{"enable_thinkin": false}'], "has 'enable_thinkin', which the chat template"),
        (['{"enable_thinking": false}', "--template", "r1"], "but the prompts are texts"),
        (["enable_thinking=false"], "chat_template_kwargs"),
    ],
)
def test_chat_template_kwargs_that_nothing_reads_are_refused(command, flags, message, folders, tmp_path, capsys):
    more = BOXED[:4] if command == "eval" else [*BOXED, "--output_dir", str(tmp_path / "run"), *QUIET]
    if command == "train":
        more += ["--per_device_train_batch_size", "4", "--num_generations", "2", "--max_completion_length", "4"]
    assert main([command, "--model_name_or_path", folders[0], *more, "--chat_template_kwargs", *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", ["sft", "train", "eval"])
def test_a_tokenizer_without_a_chat_template_is_rejected(command, tmp_path, capsys):
    plain = character_tokenizer(string.printable[:95])
    member(plain).save_pretrained(tmp_path / "plain")
    plain.save_pretrained(tmp_path / "plain")
    flags = BOXED[:4] if command == "eval" else [*BOXED, "--output_dir", str(tmp_path / "run"), *QUIET]
    assert main([command, "--model_name_or_path", str(tmp_path / "plain"), *flags]) == 2
    assert "has no chat template; use a tokenizer that has one, or a text --template" in capsys.readouterr().err
