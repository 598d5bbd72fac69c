"""SFT and training on real MATH, with the Qwen2.5 tokenizer and small random members, through the command line."""

import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from logitmix.cli.__main__ import main
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.paths import SHARED

MATH, TOKENIZER = SHARED / "data" / "math", SHARED / "tokenizers" / "qwen2.5"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MATH.exists() and TOKENIZER.exists()), reason=f"needs {MATH} and {TOKENIZER}"),
]

# What makes the recipes small enough for a CPU; all else is as they have it
SMALL = ["--dtype", "float32", "--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("math") / "base"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return str(folder)


def test_sft_then_two_outer_steps_then_a_third_from_the_checkpoint(base, tmp_path):
    sft, out = str(tmp_path / "sft"), tmp_path / "mixing"
    assert main([
        "sft", "--recipe", "math/3b/sft", "--data", str(MATH), "--model_name_or_path", base,
        "--output_dir", sft, "--train_limit", "24", "--max_length", "256", "--save_strategy", "no", *SMALL,
    ]) == 0  # fmt: skip
    train = [
        "train", "--recipe", "math/3b/fixed_mixing", "--data", str(MATH),
        "--model_name_or_path", base, "--anchor", sft, "--output_dir", str(out), "--train_limit", "64",
        "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "16", "--steps_per_generation", "16",
        "--max_completion_length", "16", "--save_steps", "1", "--eval_every", "2", "--eval_limit", "4", *SMALL,
    ]  # fmt: skip
    assert main([*train, "--max_steps", "2"]) == 0
    assert main([*train, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0

    logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [log for log in logs if "reward" in log]
    assert [log["step"] for log in steps] == [1, 2, 3]
    assert all(0 <= log["format_rate"] <= 1 and log["completions/max_length"] <= 16 for log in steps)
    evaluations = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert {(row["step"], row["name"]) for row in evaluations} == {
        (step, name) for step in (0, 2, 3) for name in ("policy", "anchor", "mixture")
    }
    model = LogitMixForCausalLM.from_pretrained(out)
    assert model.alpha == 0.5
    assert (out / "tokenizer.json").exists()
    assert main([
        "eval", "--model_name_or_path", str(out), "--task", "hendrycks_math", "--data", str(MATH), "--eval_limit", "3",
        "--max_new_tokens", "8", "--output_dir", str(tmp_path / "eval"),
    ]) == 0  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "eval" / "responses.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["policy"] * 3 + ["anchor"] * 3 + ["mixture"] * 3
    assert all(row["prompt"].endswith("Assistant: <think>") for row in rows)
