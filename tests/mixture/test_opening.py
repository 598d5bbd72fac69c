"""A checkpoint is opened whole or refused: weights that are not in its files never become random ones."""

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from logitmix.mixture.loading import load_member, load_tokenizer, require_tokenizer
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import character_tokenizer, tiny_member

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"


def save_model(folder, **kwargs):
    tiny_member(**kwargs).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def adapter(tmp_path, model):
    return save_adapter(tmp_path / "adapter", model)


def save_adapter(folder, base, **kwargs):
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | kwargs)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def edit(folder, change, file="model.safetensors"):
    """Save the weights that `change` makes of those of the file."""
    save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})


def renamed(prefix):
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


DAMAGES = {
    "compiled": (renamed("_orig_mod."), r"lack 27 weights of the model, 'lm_head.weight' first: .*torch\.compile"),
    "DDP": (renamed("module."), "lack 27 weights.*DistributedDataParallel"),
    "PEFT": (renamed("base_model.model."), "lack 27 weights.*PeftModel"),
    "foreign": (renamed("transformer.h."), "lack 27 weights.*others in their place.*another architecture"),
    "a layer": (
        lambda weights: {name: w for name, w in weights.items() if "layers.1." not in name},
        r"lack 12 weights of the model, 'model.layers.1.input_layernorm.weight' first: whole layers are absent",
    ),
    "a matrix": (
        lambda weights: {name: w for name, w in weights.items() if name != "model.norm.weight"},
        r"lack 1 weights of the model, 'model.norm.weight' first: the files are incomplete",
    ),
    "a shape": (
        lambda weights: weights | {"lm_head.weight": torch.zeros(5, 32)},
        r"1 weights .* 'lm_head.weight' is \[5, 32\], and the model's is \[61, 32\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_whose_files_lack_weights_is_refused(model, tmp_path, damage):
    change, message = DAMAGES[damage]
    healthy = shutil.copytree(model, tmp_path / "healthy")
    edit(model, change)
    with pytest.raises(ValueError, match=message):
        load_member(str(model))
    for policy, anchor in ((model, healthy), (healthy, model)):
        with pytest.raises(ValueError, match=message):
            LogitMixForCausalLM.from_members(policy, anchor)


@pytest.mark.parametrize("damage", ["compiled", "a matrix"])
def test_a_mixture_whose_files_lack_weights_is_refused(tmp_path, damage):
    LogitMixForCausalLM.from_members(tiny_member(seed=0), tiny_member("llama", seed=1)).save_pretrained(tmp_path)
    change = DAMAGES[damage][0] if damage == "compiled" else lambda w: {k: w[k] for k in list(w)[1:]}
    edit(tmp_path, change)
    for load in (LogitMixForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"lack \d+ weights of the model"):
            load(tmp_path)
    _, info = LogitMixForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]


def test_weights_that_the_model_does_not_have_are_warned_about(model):
    edit(model, lambda weights: weights | {"value_head.weight": torch.zeros(2)})
    with pytest.warns(UserWarning, match=r"1 weights at .* are not used, 'value_head.weight' first"):
        load_member(str(model))


def test_tied_weights_may_be_missing(tmp_path):
    folder = save_model(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_member(str(folder))


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("model.safetensors", b"", "model.safetensors' is empty"),
        ("model.safetensors", LFS, "model.safetensors' is a pointer of Git LFS.*git lfs pull"),
        ("model.safetensors", 3000, r"the model at .* cannot be read \(SafetensorError: .*copy or download"),
        ("pytorch_model.bin", b"no pickle", r"the model at .* cannot be read"),
        ("config.json", b"", "not a valid JSON"),
        ("tokenizer.json", b"", "tokenizer.json' is empty"),
        ("tokenizer.json", LFS, "tokenizer.json' is a pointer of Git LFS"),
        ("tokenizer.json", 300, r"the tokenizer at .* cannot be read \(JSONDecodeError"),
        ("tokenizer.json", b"{}", r"the tokenizer at .* cannot be read \(KeyError"),
        ("tokenizer_config.json", b"{", r"the tokenizer at .* cannot be read"),
    ],
)
def test_a_damaged_file_gives_one_sentence(model, tmp_path, file, data, message):
    healthy = shutil.copytree(model, tmp_path / "healthy")
    if file == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    (model / file).write_bytes((model / file).read_bytes()[:data] if isinstance(data, int) else data)
    for policy, anchor in ((model, healthy), (healthy, model)):
        with pytest.raises(ValueError, match=message):
            LogitMixForCausalLM.from_members(policy, anchor)


def test_a_folder_without_a_tokenizer_has_none(model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert load_tokenizer(str(model)) is None
    with pytest.raises(ValueError, match="no tokenizer at"):
        require_tokenizer(str(model))


def test_a_tokenizer_without_padding_and_eos_is_refused(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    tiny_member("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for key in ("pad_token", "eos_token"):
        config.pop(key, None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "TokenizersBackend"}))
    with pytest.raises(ValueError, match=r"neither a padding token nor an EOS token.*set tokenizer.eos_token"):
        require_tokenizer(str(tmp_path))


FOREIGN = {
    "another prefix": lambda weights: {name.replace("base_model.model.", "model."): w for name, w in weights.items()},
    "other layers": lambda weights: {name.replace("layers.1.", "layers.7."): w for name, w in weights.items()},
    "other modules": lambda weights: {name.replace("q_proj", "o_proj"): w for name, w in weights.items()},
    "a missing half": lambda weights: {name: w for name, w in weights.items() if "lora_B" not in name},
    "an extra weight": lambda weights: weights | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)},
    "none": lambda weights: {},
}


@pytest.mark.parametrize("change", FOREIGN)
def test_an_adapter_whose_weights_are_not_those_of_its_modules_is_refused(model, adapter, change):
    """Merged as an anchor or alone, beside the policy's adapter on one base, and as the policy's own."""
    edit(adapter, FOREIGN[change], "adapter_model.safetensors")
    other = save_adapter(adapter.parent / "other", model, r=2)
    for ways in (
        lambda: load_member(str(adapter)),
        lambda: LogitMixForCausalLM.from_members(model, adapter),
        lambda: LogitMixForCausalLM.from_members(other, adapter),
        lambda: LogitMixForCausalLM.from_members(adapter, model),
    ):
        with pytest.raises(ValueError, match=r"the adapter '.*adapter' does not fit"):
            ways()


@pytest.mark.parametrize("data", [b"", LFS])
def test_an_adapter_without_its_file_is_refused(model, adapter, data):
    (adapter / "adapter_model.safetensors").write_bytes(data)
    for ways in (lambda: load_member(str(adapter)), lambda: LogitMixForCausalLM.from_members(adapter, model)):
        with pytest.raises(ValueError, match=r"adapter_model.safetensors' is (empty|a pointer of Git LFS)"):
            ways()


def test_an_untrained_adapter_is_refused_as_an_anchor_and_warned_about_alone(tmp_path, model):
    untrained = save_adapter(tmp_path / "untrained", model, init_lora_weights=True)
    with pytest.raises(ValueError, match="does not change the base's logits"):
        LogitMixForCausalLM.from_members(model, untrained)
    with pytest.warns(UserWarning, match="does not change the base's logits"):
        load_member(str(untrained))


def test_an_untrained_adapter_is_warned_about_as_the_policy(tmp_path, model):
    adapter = save_adapter(tmp_path / "untrained", model, init_lora_weights=True)
    with pytest.warns(UserWarning, match="does not change the base's logits"):
        LogitMixForCausalLM.from_members(adapter, model)


def test_an_adapter_of_nan_is_refused_on_every_way_in(model, adapter):
    edit(adapter, lambda weights: {name: w * float("nan") for name, w in weights.items()}, "adapter_model.safetensors")
    new = LoraConfig(r=4, target_modules=["q_proj"])
    for members, config in (((model, adapter), None), ((adapter, model), None), ((model, adapter), new)):
        with pytest.raises(ValueError, match=r"4 weights of the adapter .* are not finite"):
            LogitMixForCausalLM.from_members(*members, peft_config=config)


@pytest.mark.parametrize("text", ["", "{", LFS.decode(), '{"peft_type": "UNKNOWN"}', "[]"])
def test_an_adapter_whose_configuration_cannot_be_read_is_refused(model, adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    for load in (lambda: load_member(str(adapter)), lambda: LogitMixForCausalLM.from_members(model, adapter)):
        with pytest.raises(ValueError, match=r"the adapter_config.json of '.*adapter' cannot be read"):
            load()


@pytest.mark.parametrize("damage", ["no shard", "empty index", "cut index"])
def test_a_damaged_model_of_several_files_is_refused(tmp_path, damage):
    tiny_member().save_pretrained(tmp_path, max_shard_size="20KB")
    if damage == "no shard":
        min(tmp_path.glob("model-*.safetensors")).unlink()
    else:
        (tmp_path / "model.safetensors.index.json").write_text("" if damage == "empty index" else "{")
    with pytest.raises(ValueError, match=r"the model at '.*' cannot be read"):
        load_member(str(tmp_path))


def test_a_configuration_that_contradicts_itself_is_refused(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"the config.json of '.*model' contradicts itself .*num_hidden_layers"):
        load_member(str(model))


def test_members_with_other_chat_templates_are_warned_about(tmp_path, model):
    anchor = shutil.copytree(model, tmp_path / "anchor")
    template = "{% for message in messages %}USER{{ message.content }}{% endfor %}"
    for folder, text in ((model, template), (anchor, template.lower())):
        tokenizer = character_tokenizer()
        tokenizer.chat_template = text
        tokenizer.save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"chat templates of '.*model' and '.*anchor' differ"):
        LogitMixForCausalLM.from_members(model, anchor)


CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM

class OwnConfig(Qwen2Config):
    model_type = "own_qwen2"

class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def remote_code(model):
    config = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config |= {"model_type": "own_qwen2", "architectures": ["OwnModel"], "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps(config))
    (model / "modeling_own.py").write_text(CODE)
    return model


def test_code_of_a_checkpoint_runs_only_if_it_is_trusted(remote_code, monkeypatch):
    def asked(*args):
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_member(str(remote_code))
    member = load_member(str(remote_code), trust_remote_code=True)
    assert type(member).__name__ == "OwnModel"


def test_a_mixture_with_a_checkpoints_own_code_is_refused(remote_code, tmp_path):
    """It could be trained and saved, and not be loaded again."""
    anchor = save_model(tmp_path / "anchor", seed=1)
    for members in ((remote_code, anchor), (anchor, remote_code)):
        with pytest.raises(ValueError, match=r"the class of .*OwnModel, comes with the checkpoint"):
            LogitMixForCausalLM.from_members(*members, trust_remote_code=True)
