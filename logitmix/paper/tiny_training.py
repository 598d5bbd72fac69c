"""The base and SFT models of the quickstart: TRL's SFT with the settings of the recipe `arithmetic/tiny/sft`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from logitmix.paper.recipes import SFT, TINY_CELL, configure, load_recipe
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.runs.training import train_with_progress
from logitmix.tasks.arithmetic import Arithmetic
from logitmix.training.sft import sft_dataset

CORPUS_SIZE = 20_000


def train_base(task: Arithmetic, folder: Path, title: str, steps: int, seed: int) -> None:
    """Train a tiny model from scratch on solutions that reason well and rarely keep the format.

    The seed determines the initial weights and the order of the corpus; the corpus is the task's.
    """
    tokenizer = character_tokenizer(task.alphabet)
    set_seed(seed)
    model = tiny_model(len(tokenizer))
    finetune(model, tokenizer, task.base_corpus(CORPUS_SIZE), folder, title, steps, 5e-3, seed)


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    title: str,
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """SFT on 64 rows a step; saves the model and its tokenizer into the folder."""
    changes = {"output_dir": str(folder), "max_steps": steps, "learning_rate": learning_rate, "seed": seed}
    args = configure(SFTConfig, load_recipe(f"{TINY_CELL}/{SFT}").settings(changes))
    args.disable_tqdm = True
    dataset, _ = sft_dataset(rows, tokenizer, args.max_length)
    trainer = SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    train_with_progress(trainer, title)
    trainer.save_model()
