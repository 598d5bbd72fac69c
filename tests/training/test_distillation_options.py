"""Every option of a distillation is read, or refused where nothing reads it."""

from dataclasses import MISSING, fields

import pytest

from logitmix.training.distillation import LogitMixDistillationConfig
from logitmix.training.distillation_options import NEVER_READ, READERS, validate_distillation_options
from tests.helpers.distill import distiller_of
from tests.training.test_option_readers import CONTEXT, OTHER_VALUES

DEFAULTS = {field.name: field.default for field in fields(LogitMixDistillationConfig)}
VALUES = OTHER_VALUES | {
    "cache_implementation": "static", "vllm_structured_outputs_regex": "a+", "teacher_model_name_or_path": "a",
    "teacher_model_revision": "main", "model_init_kwargs": {"dtype": "bfloat16"},
    "teacher_model_init_kwargs": {"dtype": "bfloat16"},
}  # fmt: skip
CONTEXTS = CONTEXT | {"cache_implementation": {"use_vllm": True}, "decoding": {}}


def config(**options):
    return LogitMixDistillationConfig("run", use_cpu=True, bf16=False, **options)


def other_value(option):
    default = DEFAULTS[option]
    if option in VALUES:
        return VALUES[option]
    return not default if isinstance(default, bool) else 3 if default in (None, MISSING) else default + 1


@pytest.mark.parametrize("option", [*NEVER_READ, *(option for reader in READERS for option in reader.options)])
def test_an_option_that_nothing_reads_is_refused(option):
    args = config(**CONTEXTS.get(option, {}), **{option: other_value(option)})
    with pytest.raises(ValueError, match=f"{option} is .*nothing would read it"):
        validate_distillation_options(args, {})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoding": "joint", "lmbda": 0.5},
        {"cache_implementation": "static", "use_vllm": True, "lmbda": 0.0},
        {"vllm_mode": "server", "use_vllm": True, "vllm_server_host": "localhost"},
        {"generation_kwargs": {"min_new_tokens": 3, "num_beams": 1, "max_new_tokens": 512}},
        {"generation_kwargs": {"stop": ["a"], "n": 1}, "use_vllm": True},
    ],
)
def test_options_that_are_read_are_accepted(options):
    validate_distillation_options(config(**options), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_kwargs": {"num_return_sequences": 2}}, r"'num_return_sequences'\] is 2, but a prompt has one"),
        ({"generation_kwargs": {"num_beams": 4}}, r"'num_beams'\] is 4, but a prompt has one completion"),
        ({"generation_kwargs": {"n": 2}, "use_vllm": True}, r"'n'\] is 2, but a prompt has one completion"),
        ({"generation_kwargs": {"eos_token_id": 5}}, "which completions do not read; set stop_strings instead"),
        ({"generation_kwargs": {"max_new_tokens": 513}}, "above max_completion_length 512"),
        ({"generation_kwargs": {"tempreature": 1}}, r"'tempreature'\] is 1, which generate does not know"),
        ({"auto_find_batch_size": True}, "it would split the prompts of an update"),
        ({"max_tool_calling_iterations": 2}, "there are no tools"),
    ],
)
def test_options_of_another_distillation_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        validate_distillation_options(config(**options), {})


def test_the_trainer_checks_what_a_script_has_set(tmp_path):
    with pytest.raises(ValueError, match="teacher_model_name_or_path is 'a', but nothing would read it"):
        distiller_of(tmp_path, teacher_model_name_or_path="a")
    assert distiller_of(tmp_path, top_k=-1).generation_kwargs["top_k"] == 0, "generate reads None as 50, -1 as wrong"
