"""Training configurations as flags, described in a file, against the configurations themselves."""

import json
from dataclasses import MISSING, fields
from importlib import import_module

import pytest

from logitmix.cli.options import described as module
from logitmix.cli.options.described import CONFIGURATIONS, FILE, describe_all, described
from logitmix.cli.train import parse_train
from logitmix.training.config import LogitMixGRPOConfig

CPU = {"output_dir": "run", "use_cpu": True, "bf16": False}
FLAGS = ["--model_name_or_path", "x", "--output_dir", "run", "--use_cpu", "true", "--bf16", "false"]


def real(name):
    return getattr(import_module(CONFIGURATIONS[name]), name)


def test_the_file_describes_the_configurations():
    assert json.loads(FILE.read_text()) == describe_all(), "run `make flags`"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_described_class_has_the_fields_and_defaults_of_its_configuration(name):
    ours, theirs = fields(described(name)), [f for f in fields(real(name)) if f.init]
    assert [f.name for f in ours] == [f.name for f in theirs]
    for mine, wanted in zip(ours, theirs, strict=True):
        for field in (mine, wanted):
            assert MISSING in (field.default, field.default_factory)
        assert mine.default == wanted.default
        assert (mine.default_factory is MISSING) == (wanted.default_factory is MISSING)
    assert described(name)(**CPU).configuration().to_dict() == real(name)(**CPU).to_dict()


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        (["--lr_scheduler_type", "cosine"], {"lr_scheduler_type": "cosine"}),
        (["--optim", "adamw_torch", "--debug", "underflow_overflow"],
         {"optim": "adamw_torch", "debug": "underflow_overflow"}),
        (["--lr_scheduler_kwargs", '{"num_cycles": 2}'], {"lr_scheduler_kwargs": '{"num_cycles": 2}'}),
        (["--stop_strings", "</a>", "b"], {"stop_strings": ["</a>", "b"]}),
        (["--reward_weights", "0.5"], {"reward_weights": [0.5]}),
        (["--no_disable_dropout"], {"disable_dropout": False}),
        (["--scheme", "prob", "--alpha=0.3"], {"scheme": "prob", "alpha": 0.3}),
        (["--save-strategy", "no"], {"save_strategy": "no"}),
    ],
)  # fmt: skip
def test_flags_make_the_configuration_itself(flags, values):
    parsed = parse_train([*FLAGS, *flags]).training
    assert type(parsed) is LogitMixGRPOConfig
    assert parsed.to_dict() == LogitMixGRPOConfig(**CPU, **values).to_dict()
    # `checkpoint-*/training_args.bin` is pickled
    assert {type(value).__module__ for value in vars(parsed).values()}.isdisjoint({module.__name__, "types"})


def test_another_version_of_a_library_is_described_from_its_import(monkeypatch):
    monkeypatch.setattr(module, "version", lambda library: "99.0")
    monkeypatch.setattr(module, "_read", lambda: {"versions": {}, "configurations": {}})
    assert [f.name for f in fields(described("LogitMixGRPOConfig"))] == [
        f.name for f in fields(LogitMixGRPOConfig) if f.init
    ]
