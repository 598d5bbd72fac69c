import pytest

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.adapters import save_folders
from tests.helpers.members import tiny_member


@pytest.fixture
def pair():
    return tiny_member("qwen2", 0), tiny_member("llama", 1)


@pytest.fixture
def model(pair):
    return LogitMixForCausalLM.from_members(*pair, alpha=0.3)


@pytest.fixture
def folders(tmp_path):
    """A base, an SFT model and adapters on the base, by name."""
    return save_folders(tmp_path)
