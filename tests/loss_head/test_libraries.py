"""The choice between two libraries of matrix products, by a measurement."""

import math

import pytest
import torch

from logitmix.loss_head import fused_log_probs, libraries
from logitmix.loss_head.libraries import choose_libraries, choose_library, measure, read_choices
from logitmix.loss_head.scorer import FusedScorer
from logitmix.mixture.head import Head
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.grpo import mixture, trainer_of
from tests.helpers.loss_head import both_schemes, gradients, known
from tests.helpers.members import tiny_member

PRODUCTS = ["logits", "hidden_gradient", "weight_gradient"]
ROWS, WIDTH = 2048, 64  # a tile that is large enough to be measured

pytestmark = pytest.mark.skipif(not libraries.has_onednn(), reason="oneDNN or AVX-512 is missing")


@pytest.fixture(autouse=True)
def no_choices(monkeypatch):
    monkeypatch.setattr(libraries, "_choices", {})


def measured_as(monkeypatch, onednn_seconds: float) -> list[tuple[str, int]]:
    """Let every measurement find 1 second for `torch.mm`; returns the list of measurements."""
    measured = []

    def measure(product, width):
        measured.append((product, width))
        return {"torch.mm": 1.0, "oneDNN": onednn_seconds}

    monkeypatch.setattr(libraries, "measure", measure)
    return measured


@pytest.mark.parametrize(
    ("onednn_seconds", "library"), [(0.5, "oneDNN"), (0.9, "torch.mm"), (1.1, "torch.mm"), (1.8, "torch.mm")]
)
def test_onednn_is_chosen_where_it_is_clearly_faster(monkeypatch, onednn_seconds, library):
    measured_as(monkeypatch, onednn_seconds)
    assert choose_libraries(ROWS, WIDTH) == dict.fromkeys(PRODUCTS, library)


def test_each_class_is_measured_once_in_a_process(monkeypatch):
    measured = measured_as(monkeypatch, 0.5)
    for rows in (ROWS, 50_000, ROWS - 5):
        choose_libraries(rows, WIDTH)
    choose_libraries(ROWS, WIDTH + 1)
    assert measured == [(product, width) for width in (WIDTH, WIDTH + 1) for product in PRODUCTS]


def test_threads_have_choices_of_their_own(monkeypatch):
    measured = measured_as(monkeypatch, 0.5)
    for threads in (1, 2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        choose_library("logits", ROWS, WIDTH)
    assert len(measured) == 2


def test_small_heads_and_a_disabled_onednn_are_not_measured(monkeypatch):
    measured = measured_as(monkeypatch, 0.1)
    assert choose_library("logits", 61, 32) == "torch.mm"
    with torch.backends.mkldnn.flags(enabled=False):
        assert choose_library("logits", ROWS, WIDTH) == "torch.mm"
    assert not measured
    choose_library("logits", ROWS, WIDTH)
    with torch.backends.mkldnn.flags(enabled=False):
        assert choose_library("logits", ROWS, WIDTH) == "torch.mm", "also after a choice"


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_measurement_finds_times_and_draws_no_random_numbers(product):
    state = torch.get_rng_state()
    seconds = measure(product, WIDTH)
    assert set(seconds) == {"torch.mm", "oneDNN"}
    assert all(0 < value < math.inf for value in seconds.values())
    assert torch.equal(torch.get_rng_state(), state)


@both_schemes
def test_each_product_takes_the_library_of_its_class(monkeypatch, scheme):
    """The numbers agree up to rounding, whatever was chosen."""
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(7, WIDTH, generator=generator).requires_grad_() for _ in range(2)]
    heads = [Head((0.1 * torch.randn(ROWS, WIDTH, generator=generator)).requires_grad_()) for _ in range(2)]
    targets = torch.randint(ROWS, (7,), generator=generator)

    def run():
        scores = fused_log_probs(hidden, heads, [0.4, 0.6], targets, scheme, coefficients=known(7))
        return [*(s.detach() for s in scores), *gradients(scores, [*hidden, *(head.weight for head in heads)])]

    found = []
    for seconds in (0.5, 2.0):
        libraries._choices.clear()
        measured = measured_as(monkeypatch, seconds)
        found.append(run())
        assert set(measured) == {(product, WIDTH) for product in PRODUCTS}
    for onednn, mm in zip(*found, strict=True):
        torch.testing.assert_close(onednn, mm, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_also_holds_the_choices_of_members_that_have_not_run(monkeypatch):
    monkeypatch.setattr(libraries, "_LEAST_ELEMENTS", 0)
    measured_as(monkeypatch, 0.5)
    model = mixture(alpha=0.0)
    widths = {model.policy.config.hidden_size, model.anchor_0.config.hidden_size}
    assert len(widths) == 2
    choices = FusedScorer(model).read_libraries()
    assert {(product, width) for product, width, _ in choices} == {(p, w) for p in PRODUCTS for w in widths}


def test_a_resumed_run_keeps_its_libraries_whatever_the_clock_says(monkeypatch, tmp_path):
    """Bit for bit, as one process with other measurements than the first."""
    monkeypatch.setattr(libraries, "_LEAST_ELEMENTS", 0)
    options = {"max_steps": 4, "num_iterations": 2, "dynamic_sampling": "off"}

    def train(name, onednn_seconds, **more):
        libraries._choices.clear()  # as in a process of its own
        measured_as(monkeypatch, onednn_seconds)
        wide = {"hidden_size": 256, "initializer_range": 0.1}  # sums of this length are rounded differently
        model = LogitMixForCausalLM.from_members(tiny_member("qwen2", 0, **wide), tiny_member("llama", 1), alpha=0.4)
        trainer = trainer_of(tmp_path / name, model, **options, **more)
        checkpoint = tmp_path / name / "checkpoint-1"
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint.exists() else None)
        return trainer.model.state_dict()

    whole = train("run", 0.5, save_strategy="steps", save_steps=1)
    resumed = train("run", 2.0)
    assert set(read_choices().values()) == {"oneDNN"}
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    other = train("other", 2.0)
    if all(torch.equal(value, whole[name]) for name, value in other.items()):
        pytest.skip("the libraries round alike on this processor, so that the resumed run could not differ")
