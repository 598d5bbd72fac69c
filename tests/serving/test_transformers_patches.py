"""What serving/transformers_patches.py assumes of `transformers.cli.serving`."""

from importlib.metadata import version

import pytest

pytest.importorskip("fastapi", reason="what serving needs is not installed: pip install 'logitmix[serve]'")

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState

from logitmix.serving import transformers_patches
from tests.helpers.contracts import assert_has, assert_parameters


def test_a_model_manager_has_the_methods_that_we_replace():
    assert_has("transformers", ModelManager, "load_model_and_processor", "process_model_name", "get_gen_models")
    assert "force_model" in ModelManager.__init__.__code__.co_varnames, f"transformers {version('transformers')}"


def test_the_generation_state_keeps_a_manager_that_requests_ask_for():
    assert_parameters("transformers", GenerationState.get_manager, "self", "model_id")
    assert not hasattr(GenerationState(), "_manager"), "the name that we use for our one manager is taken"
    assert_has("transformers", GenerateManager, "submit", "async_submit")
    for name in ("generate_streaming", "generate_non_streaming"):
        assert_parameters("transformers", getattr(GenerateManager, name), "self", "model", "processor", "inputs")


@pytest.mark.parametrize("handler", [ChatCompletionHandler, CompletionHandler, ResponseHandler])
def test_a_handler_lists_the_fields_that_it_accepts(handler):
    assert_has("transformers", handler, "_valid_params_class", "handle_request")
    assert {"model", "stream"} <= set(transformers_patches.request_fields(handler))


def test_the_version_that_the_patches_were_written_against_is_the_one_installed():
    assert f"transformers {'.'.join(version('transformers').split('.')[:2])}" in transformers_patches.__doc__
