"""Commands on tiny models, and the errors that they print."""

from pathlib import Path

import torch

from logitmix.cli.__main__ import main
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.tasks import Arithmetic

TINY = [
    "--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--max_completion_length", "24", "--logging_steps",
    "1", "--per_device_train_batch_size", "16", "--num_generations", "4", "--learning_rate", "1e-4", "--train_limit",
    "64", "--save_strategy", "no",
]  # fmt: skip


def save_member(folder: Path, seed: int, alphabet: str = Arithmetic.alphabet) -> str:
    tokenizer = character_tokenizer(alphabet)
    torch.manual_seed(seed)
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def error_of(capsys, argv) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    message = captured.err.splitlines()[-1]
    assert message.startswith("logitmix: error: ")
    assert "Traceback" not in captured.err
    return message
