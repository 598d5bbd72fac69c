"""Offline, deterministic, on one thread: many small operations are slower on two."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Keep what the imports made out of garbage collection: each trainer runs one, which took a third of a second."""
    gc.freeze()


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> tuple[str, str]:
    """The folders of a tiny base and of a tiny SFT model, with tokenizers."""
    from tests.helpers.commands import save_member

    folder = tmp_path_factory.mktemp("members")
    return save_member(folder / "base", 0), save_member(folder / "sft", 1)
