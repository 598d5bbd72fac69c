"""What the tests of both servers share: one mixture, saved, and the official client."""

import pytest


@pytest.fixture(scope="module")
def mixture():
    from tests.helpers.engines import mixture_of
    from tests.helpers.servers import TEMPLATE

    model = mixture_of("qwen2", "llama", alpha=0.4)
    model.tokenizer.chat_template = TEMPLATE
    return model


@pytest.fixture(scope="module")
def folder(mixture, tmp_path_factory):
    """A folder with the mixture in `mixture`, at another alpha than the server is started with."""
    folder = tmp_path_factory.mktemp("served")
    mixture.alpha = 0.9
    mixture.save_pretrained(folder / "mixture")
    mixture.alpha = 0.4
    return folder


@pytest.fixture(scope="module")
def client(server):
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240)
