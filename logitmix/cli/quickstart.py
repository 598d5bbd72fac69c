"""`logitmix quickstart`: the paper's argument at toy size, on a CPU and without downloads; see `paper.quickstart`."""

import time
from collections.abc import Sequence

from logitmix.cli.options.parser import parse
from logitmix.paper.quickstart_config import QuickstartConfig


def main(argv: Sequence[str]) -> None:
    description = (
        "Train a tiny base model and an SFT model on arithmetic, mix them at every alpha, and train two arms from the "
        "pair: a few minutes on two CPU cores, without downloads."
    )
    config = parse("quickstart", description, QuickstartConfig, argv)

    from logitmix.paper.quickstart import run_quickstart
    from logitmix.runs.console import console
    from logitmix.runs.folder import find_checkpoint, record_start

    started = time.monotonic()
    arguments = {"command": "quickstart"} | vars(config)
    find_checkpoint(config.output_dir, arguments, resume=None)
    record_start(config.output_dir, arguments)
    run_quickstart(config)
    console.print(
        f"Seed {config.seed}, {time.monotonic() - started:.0f} s. Everything is in {config.output_dir}: sweep.png, "
        "curves.png, results.jsonl, and a checkpoint of each model."
    )
