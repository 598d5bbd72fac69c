"""Anchors whose files other programs have quantised, loaded for real on this machine."""

import json

import pytest
import torch

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import INPUT, character_tokenizer, logits, tiny_member
from tests.helpers.quantized_files import SCHEMES, save_compressed_tensors, save_fp8


@pytest.mark.parametrize("kind", SCHEMES)
def test_a_compressed_tensors_checkpoint_is_an_anchor_as_it_is(tmp_path, kind):
    pytest.importorskip("compressed_tensors")
    expected = save_compressed_tensors(tmp_path / "anchor", kind)
    mixture = LogitMixForCausalLM.from_members(tiny_member("qwen2"), str(tmp_path / "anchor"), alpha=0.4)
    assert mixture.config.quantized_models == ["anchor_0"]
    assert not any(parameter.requires_grad for parameter in mixture.anchor_0.parameters())
    with torch.no_grad():
        torch.testing.assert_close(mixture(**INPUT, alpha=1.0).logits, logits(expected), rtol=1e-4, atol=1e-4)
    mixture.save_pretrained(tmp_path / "mixture")
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(tmp_path / "mixture")), logits(mixture))


def test_an_fp8_checkpoint_has_its_values_as_plain_numbers_on_a_cpu(tmp_path):
    expected = save_fp8(tmp_path / "anchor")
    mixture = LogitMixForCausalLM.from_members(tiny_member("qwen2"), str(tmp_path / "anchor"), alpha=0.4)
    if torch.cuda.is_available():
        pytest.skip("a GPU keeps the numbers in FP8")
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(mixture.anchor_0.state_dict()[name].float(), weight, rtol=2**-8, atol=1e-6)
    mixture.save_pretrained(tmp_path / "mixture")
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(tmp_path / "mixture")), logits(mixture))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_checkpoint_whose_library_is_missing_is_refused(tmp_path, method):
    tiny_member("qwen2", 1).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"cannot be held with quantised weights here \(.*; install what it needs"):
        LogitMixForCausalLM.from_members(tiny_member("qwen2"), str(tmp_path))
