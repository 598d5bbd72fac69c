"""`--help`: short, complete for the flags of logitmix, and quick for commands that need no TRL."""

import dataclasses
import subprocess
import sys

import pytest
from trl import GRPOConfig, SFTConfig

from logitmix.cli.__main__ import VERBS, main
from logitmix.cli.options.help import COMMON
from logitmix.cli.train import TrainOptions
from logitmix.serving.requests import REQUEST_FIELDS
from logitmix.training.config import LogitMixGRPOConfig


def help_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 0
    return capsys.readouterr().out


def flags_in(printed: str) -> set[str]:
    return {word[2:] for line in printed.splitlines() for word in line.split()[:1] if word.startswith("--")}


def test_train_shows_its_own_flags_and_the_common_ones_of_trl(capsys):
    printed = help_of(capsys, "train", "--help")
    own = {f.name for group in dataclasses.fields(TrainOptions) for f in dataclasses.fields(group.type) if f.init}
    of_trl = {f.name for f in dataclasses.fields(GRPOConfig)}
    assert flags_in(printed) >= own - of_trl
    assert flags_in(printed) & of_trl == {name for name in COMMON if name in of_trl} | {"loss_type", "disable_dropout"}
    assert len(printed.splitlines()) < 220
    assert "`logitmix train --help all` lists" in " ".join(printed.split())


def test_all_shows_every_flag(capsys):
    printed = help_of(capsys, "train", "--help", "all")
    assert flags_in(printed) >= {f.name for f in dataclasses.fields(LogitMixGRPOConfig) if f.init}


def test_the_common_flags_exist():
    fields = {f.name for config in (GRPOConfig, SFTConfig) for f in dataclasses.fields(config)}
    assert COMMON.keys() <= fields


@pytest.mark.parametrize(
    "verb", [verb for verb in VERBS if verb not in ("train", "sft", "serve", "recipes", "verify", "lm-eval")]
)
def test_help_does_not_import_torch(verb):
    code = f"""
import sys
from logitmix.cli.__main__ import main
try:
    main([{verb!r}, "--help"])
except SystemExit as stop:
    assert stop.code == 0
assert "torch" not in sys.modules
"""
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.startswith(f"usage: logitmix {verb} ")
    assert "Flags may also come from a YAML file" in printed


@pytest.mark.parametrize("verb", ["serve", "recipes"])
def test_help_of_commands_with_a_parser_of_their_own(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert "logitmix" in capsys.readouterr().out


def test_help_of_serve_lists_the_fields_of_a_request_and_the_main_flags_of_vllm(capsys):
    main(["serve", "--help"])
    out = capsys.readouterr().out
    for word in (*REQUEST_FIELDS, "member_logprobs", "--tensor_parallel_size", "--max_model_len", "--alpha_range"):
        assert word in out
