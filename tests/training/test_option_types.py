"""Values of options from a script and from a YAML file: one element of a list, and values of the wrong type."""

from dataclasses import fields
from typing import get_args, get_origin, get_type_hints

import pytest

from logitmix.cli.sft import SFTOptions
from logitmix.cli.train import TrainOptions, parse_train
from logitmix.mixture.generation import generate_completions
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.option_types import typed
from tests.helpers.commands import error_of
from tests.helpers.members import character_tokenizer, tiny_member

REQUIRED = ["--model_name_or_path", "x", "--output_dir", "run", "--use_cpu", "true", "--bf16", "false"]
GROUPS = {*get_type_hints(TrainOptions).values(), *get_type_hints(SFTOptions).values()}
ELEMENTS = {str: "</answer>", float: 0.5, int: 3}


def config(**options):
    return LogitMixGRPOConfig("run", use_cpu=True, **{"bf16": False, **options})


def parsed(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    return parse_train([*REQUIRED, "--config", str(tmp_path / "config.yaml")])


def lists_of(group):
    for name, hint in get_type_hints(group).items():
        kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
        if len(kinds) == 1 and get_origin(kinds[0]) is list:
            yield name, get_args(kinds[0])[0]


@pytest.mark.parametrize("group", sorted(GROUPS, key=lambda group: group.__name__))
def test_one_element_of_every_list_valued_option_is_a_list_of_it(group):
    names = {field.name for field in fields(group)}
    for name, kind in lists_of(group):
        assert name in names
        element = ELEMENTS[kind]
        assert typed(group, {name: element}) == {name: [element]}
        assert typed(group, {name: (element, element)}) == {name: [element, element]}


def test_a_text_for_the_stop_strings_is_one_string(tmp_path):
    assert config(stop_strings="</answer>").stop_strings == ["</answer>"]
    assert parsed(tmp_path, 'stop_strings: "</answer>"').training.stop_strings == ["</answer>"]
    assert parsed(tmp_path, "lora_target_modules: q_proj\nuse_peft: true").adapter.lora_target_modules == ["q_proj"]


def test_a_stop_string_stops_at_the_whole_text():
    tokenizer, model = character_tokenizer(), tiny_member()
    prompt = tokenizer(["ab="])["input_ids"]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    (whole,) = generate_completions(model, tokenizer, prompt, settings)
    text = tokenizer.decode(whole[3:5])
    (stopped,) = generate_completions(model, tokenizer, prompt, settings, text)
    assert tokenizer.decode(stopped).endswith(text)
    assert len(stopped) > 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_steps", 1.5, "max_steps is 1.5, but must be a whole number"),
        ("num_generations", 8.0, "num_generations is 8.0, but must be a whole number; write 8"),
        ("seed", True, "seed is True, but must be a whole number"),
        ("learning_rate", "1e-6", "learning_rate is '1e-6', but must be a number; write it without quotes"),
        ("bf16", "false", "bf16 is 'false', but must be true or false"),
        ("stop_strings", [5], "stop_strings holds 5, but each of its elements must be a text; write it in quotes"),
        ("scheme", "mean", "scheme is 'mean'; it must be one of 'logit', 'prob'"),
    ],
)
def test_a_value_of_another_type_is_refused_in_a_script(option, value, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        config(**{option: value})


@pytest.mark.parametrize("text", ["max_steps: 1.5", "train_limit: 10.0", "eval_every: 2.5", "alpha_points: 100:0.3"])
def test_a_value_of_another_type_is_refused_in_a_file(tmp_path, capsys, text):
    (tmp_path / "config.yaml").write_text(text)
    error = error_of(capsys, ["train", *REQUIRED, "--config", str(tmp_path / "config.yaml")])
    assert text.split(":")[0] in error


@pytest.mark.parametrize("flags", [["--max_steps", "1.5"], ["--train_limit", "10.0"]])
def test_a_fraction_is_refused_as_a_flag(capsys, flags):
    assert flags[0] in error_of(capsys, ["train", *REQUIRED, *flags])
