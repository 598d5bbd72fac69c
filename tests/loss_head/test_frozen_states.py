"""The states of frozen members: those that are adapters on one base read few tokens in one pass over its weights."""

import pytest
import torch

from logitmix.loss_head.scorer import FusedScorer
from logitmix.mixture.adapters import RowsAreMixed
from logitmix.mixture.folding import MOST_TOKENS
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.adapters import mixture, save_adapter, save_folders
from tests.helpers.grpo import mixture as mixture_of_models
from tests.helpers.members import INPUT


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    return save_folders(path) | {
        "dora": save_adapter(path / "dora", str(path / "base"), 3, use_dora=True),
        "whole": save_adapter(path / "whole", str(path / "base"), 4, modules_to_save=["o_proj"]),
    }


def states_and_passes(model, repeats=1, scorer=None):
    """The members' states, those of a pass for each, and the number of passes over the first model's decoder."""
    passes = []
    hook = model.policy.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    scorer = scorer or FusedScorer(model)
    passes.clear()
    ids, mask = (INPUT[name].repeat(repeats, 1) for name in ("input_ids", "attention_mask"))
    scored = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    states = scorer.frozen_states(model.config.members, ids, mask, scored)
    count = len(passes)
    hook.remove()
    with torch.no_grad():
        alone = [scorer.hidden_states(name, ids, mask, scored) for name in model.config.members]
    return states, alone, count


@pytest.mark.parametrize("kind", ["two adapters", "base anchor", "three", "whole modules"])
def test_members_on_one_base_are_read_in_one_pass(folders, kind):
    if kind == "three":
        anchors = [folders["anchor adapter"], folders["base"]]
        model = LogitMixForCausalLM.from_members(folders["policy adapter"], anchors, weights=[0.5, 0.3, 0.2])
    elif kind == "whole modules":
        model = LogitMixForCausalLM.from_members(folders["whole"], folders["policy adapter"], alpha=0.3)
    else:
        model = mixture(kind, folders)
    model.train()
    states, alone, passes = states_and_passes(model)
    assert passes == 1
    for state, expected in zip(states, alone, strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)
    assert (states[0] - states[1]).abs().max() > 1e-2
    assert model.policy.training


def test_each_is_read_alone_where_it_cannot_be_or_with_many_tokens(folders, monkeypatch):
    model = mixture("two adapters", folders)
    scorer = FusedScorer(model)
    many = MOST_TOKENS // INPUT["input_ids"].numel()
    dora = LogitMixForCausalLM.from_members(folders["dora"], folders["base"], alpha=0.3)
    runs = [states_and_passes(model, many, scorer), states_and_passes(dora), states_and_passes(mixture_of_models())]
    assert [passes for *_, passes in runs] == [2, 2, 1], "of the policy's model"
    for states, alone, _ in runs:
        assert all(torch.equal(state, expected) for state, expected in zip(states, alone, strict=True))

    def fail(*args):
        raise RowsAreMixed

    monkeypatch.setattr(scorer, "_states_of_one_pass", fail)
    assert states_and_passes(model, 1, scorer)[2] == 2
    monkeypatch.undo()
    assert states_and_passes(model, 1, scorer)[2] == 2, "not tried again"


def test_a_layer_that_does_not_see_the_rows_apart_is_refused(folders):
    model = mixture("two adapters", folders)
    layer = model.policy.model.layers[0].self_attn.q_proj
    width = layer.in_features
    with model.adapters.as_members(["policy", "anchor_0"], then="policy"):
        assert layer(torch.ones(2, 3, width)).shape[:2] == (2, 3)
        for shape in ((2, width), (3, 2, width)):
            with pytest.raises(RowsAreMixed):
                layer(torch.ones(shape))
    assert layer(torch.ones(3, 2, width)).shape[:2] == (3, 2)
