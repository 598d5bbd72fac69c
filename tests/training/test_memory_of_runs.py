"""The memory and disk that a dry run predicts, against those of the run itself: a process on this CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from logitmix.cli.__main__ import main
from logitmix.paper.tiny_model import character_tokenizer
from logitmix.tasks import Arithmetic

TRAIN = [
    "train", "--task", "arithmetic", "--train_limit", "64", "--use_cpu", "true", "--bf16", "true", "--report_to",
    "none", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "8",
    "--num_generations", "8", "--max_completion_length", "24", "--gradient_accumulation_steps", "1",
    "--gradient_checkpointing", "false",
]  # fmt: skip
LONG = ["--max_completion_length", "96", "--generation_kwargs", '{"min_new_tokens": 96}']
RUNS = {
    "float32 anchor": ["--anchor", "sft"],
    "bfloat16 anchor": ["--anchor", "bf16"],
    "int8 anchor": ["--anchor", "bf16", "--anchor_quantization", "int8"],
    "bfloat16 anchor, offloaded": ["--anchor", "bf16", "--offload_anchor", "true"],
    "GRPO with KL": ["--beta", "0.01", "--loss_type", "grpo"],
    "LoRA pair": ["--anchor", "adapter", "--use_peft", "true", "--lora_target_modules", "all-linear"],
    "LoRA, anchor apart": ["--anchor", "sft", "--use_peft", "true", "--lora_target_modules", "all-linear"],
    "long rollouts, accumulated": ["--anchor", "bf16", *LONG, "--per_device_train_batch_size", "16",
                                   "--gradient_accumulation_steps", "2", "--steps_per_generation", "4"],
}  # fmt: skip


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("members"), character_tokenizer(Arithmetic.alphabet)
    config = Qwen2Config(
        vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    for name, seed, dtype in (("base", 0, torch.float32), ("sft", 1, torch.float32), ("bf16", 1, torch.bfloat16)):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    base = Qwen2ForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(base, LoraConfig(init_lora_weights=False, target_modules="all-linear", r=4))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "adapter")
    return folder


def run(argv: list[str]) -> int:
    """The peak resident memory of a process of the command line.

    bitsandbytes counts as not installed: PEFT would import it beside adapters, which takes 0.35 GB.
    """
    script = "import resource,sys; sys.modules['bitsandbytes'] = None; from logitmix.cli.__main__ import main; "
    script += "assert main(sys.argv[1:]) == 0; "
    script += "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    output = subprocess.run(
        [sys.executable, "-c", script, *argv],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).stdout
    return int(re.search(r"PEAK (\d+)", output)[1]) * 1024


@pytest.mark.slow
def test_a_dry_run_predicts_peak_memory_and_disk_within_15_percent(members, tmp_path, capsys):
    pytest.importorskip("torchao")
    rows = []
    for name, flags in RUNS.items():
        out = tmp_path / name.replace(" ", "_")
        flags = [str(members / flag) if (members / flag).is_dir() else flag for flag in flags]
        argv = [*TRAIN, "--model_name_or_path", str(members / "base"), "--output_dir", str(out), *flags]
        capsys.readouterr()
        assert main([*argv, "--dry_run", "--prompt_length", "16"]) == 0
        printed = capsys.readouterr().out
        memory = float(re.search(r"at most at a time\D*([\d.]+)", printed)[1])
        disk = float(re.search(r"Disk at the end of the run: ([\d.]+)", printed)[1])
        peak = run(argv) / 2**30
        on_disk = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file()) / 2**30
        rows.append((name, memory, peak, disk, on_disk))
    with capsys.disabled():
        print(
            f"\n{'':30}{'memory, GiB: predicted':>24}{'measured':>10}{'ratio':>7}"
            f"{'disk: predicted':>17}{'measured':>10}"
        )
        for name, memory, peak, disk, on_disk in rows:
            print(f"{name:30}{memory:24.2f}{peak:10.2f}{memory / peak:7.2f}{disk:17.2f}{on_disk:10.2f}")
    for name, memory, peak, disk, on_disk in rows:
        assert memory == pytest.approx(peak, rel=0.15), name
        assert disk == pytest.approx(on_disk, rel=0.15, abs=0.02), name
