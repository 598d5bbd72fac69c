"""What serving/transformers_patches.py and serving/without_vllm.py assume of `transformers.cli.serving`."""

import inspect
import re
from importlib.metadata import version

import pytest

pytest.importorskip("fastapi", reason="what serving needs is not installed: pip install 'logitmix[serve]'")

from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from logitmix.serving import transformers_patches
from logitmix.serving.transformers_patches import accepted_fields
from logitmix.serving.without_vllm import (
    HARMLESS,
    NEUTRAL,
    SUPPORTED,
    MixtureChatHandler,
    MixtureCompletionHandler,
    MixtureResponseHandler,
)
from tests.helpers.contracts import assert_has, assert_parameters

INSTALLED = f"transformers {version('transformers')}"
HANDLERS = [MixtureChatHandler, MixtureCompletionHandler, MixtureResponseHandler]


def test_single_model_manager_replaces_methods_of_the_model_manager():
    assert_has("transformers", ModelManager, "load_model_and_processor", "process_model_name", "get_gen_models")
    assert "force_model" in inspect.signature(ModelManager).parameters, INSTALLED


def test_single_generation_state_replaces_how_a_manager_is_found():
    assert_parameters("transformers", GenerationState.get_manager, "self", "model_id")
    assert not hasattr(GenerationState(), "_manager"), f"{INSTALLED}: GenerationState uses the name _manager itself"


def test_mixture_generate_manager_replaces_methods_of_the_generate_manager():
    assert_has("transformers", GenerateManager, "submit", "async_submit")
    for name in ("generate_streaming", "generate_non_streaming"):
        assert_parameters("transformers", getattr(GenerateManager, name), "self", "model", "processor", "inputs")


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_handler_lists_the_fields_that_it_accepts(handler):
    assert_has("transformers", handler, "_valid_params_class", "handle_request")
    assert handler.supported_fields | SUPPORTED <= set(accepted_fields(handler)), INSTALLED


@pytest.mark.parametrize("handler", HANDLERS)
def test_transformers_reads_the_supported_fields_and_no_others(handler):
    """Its handlers read each field by name from `body`."""
    supported = SUPPORTED | handler.supported_fields
    bases = [base for base in handler.__mro__ if base.__module__.startswith("transformers")]
    read = set(re.findall(r'body(?:\.get\(|\[)"(\w+)"', "".join(map(inspect.getsource, bases))))
    assert supported - {"seed"} <= read, INSTALLED  # `RequestFieldsMixin` sets the seed
    assert read & accepted_fields(handler) - supported <= HARMLESS | NEUTRAL.keys(), INSTALLED


def test_the_installed_version_is_the_one_that_the_patches_were_written_for():
    assert f"transformers {'.'.join(version('transformers').split('.')[:2])}" in transformers_patches.__doc__, (
        INSTALLED
    )
