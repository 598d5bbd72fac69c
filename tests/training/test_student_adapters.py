"""A student that is an adapter on the members' own weights: what it shares, where it starts, how it trains."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import set_seed

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.student_adapters import adapter_on_member, shared_bytes
from logitmix.training.students import build_student
from tests.helpers.adapters import lora, mixture, save_adapter, save_folders
from tests.helpers.distill import distiller_of
from tests.helpers.grpo import mixture as mixture_of_models
from tests.helpers.members import INPUT
from tests.training.test_distillation import batch_of, gradients_of

POLICY = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
BOTH = {"r": 10, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_folders(tmp_path_factory.mktemp("adapters"))


def logits(model, **kwargs):
    with torch.no_grad():
        return model.eval()(**INPUT, **kwargs).logits


def own_parameters(student, teacher):
    held = {id(p) for p in teacher.parameters()}
    return [name for name, p in student.named_parameters() if id(p) not in held]


@pytest.mark.parametrize(
    ("source", "config"),
    [
        ("policy", POLICY),
        ("policy", POLICY | {"r": 7, "lora_alpha": 3}),
        ("policy", {"r": 5, "target_modules": "all-linear", "use_rslora": True}),
        ("anchor", {"r": 6, "target_modules": ["k_proj", "v_proj"]}),
        ("merged", BOTH),
        ("{base}", POLICY),
    ],
)
def test_a_student_starts_as_its_source_on_the_members_own_weights(folders, source, config):
    teacher = mixture("two adapters", folders)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    source = source.format(**folders)
    student = build_student(teacher, source, peft_config=lora(**config))
    assert isinstance(student, PeftModel)
    assert all(".default." in name for name in own_parameters(student, teacher))
    assert all(p.requires_grad == (".default." in name) for name, p in student.named_parameters())
    plain = build_student(teacher, source)
    assert shared_bytes(student, teacher) == sum(p.numel() * p.element_size() for p in plain.parameters())
    exact = config == POLICY or source == "anchor"
    torch.testing.assert_close(logits(student), logits(plain), rtol=1e-4, atol=1e-4)
    if source in ("policy", "anchor") and exact:
        with torch.no_grad(), teacher.as_member(teacher.config.resolve_member_name(source)) as member:
            assert torch.equal(logits(student), member(**INPUT).logits)
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT's, of a bias, which has one axis
@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"modules_to_save": ["o_proj"]}, {"lora_bias": True, "target_modules": ["q_proj"]}]
)
def test_more_than_two_factors_are_copied_to_an_adapter_of_the_same_configuration(folders, tmp_path, config):
    adapter = save_adapter(tmp_path / "adapter", folders["base"], 3, **config)
    teacher = LogitMixForCausalLM.from_members(adapter, folders["base"], alpha=0.3)
    student = build_student(teacher, "policy", peft_config=lora(**config))
    assert all(".default" in name for name in own_parameters(student, teacher))
    assert torch.equal(logits(student), logits(teacher.policy))
    assert adapter_on_member(teacher, "policy", lora(r=64, target_modules="all-linear")) is None


@pytest.mark.parametrize(
    ("source", "config"),
    [
        ("policy", POLICY | {"r": 3}),
        ("policy", POLICY | {"target_modules": ["q_proj", "v_proj"]}),
        ("policy", POLICY | {"use_dora": True}),
        ("policy", POLICY | {"bias": "all"}),
        ("policy", POLICY | {"init_lora_weights": "pissa"}),
        ("policy", POLICY | {"init_lora_weights": False}),
        ("merged", BOTH | {"r": 9}),
        ("{sft}", POLICY),
    ],
)
def test_an_adapter_without_room_for_its_source_is_on_a_copy(folders, tmp_path, source, config):
    teacher, source = mixture("two adapters", folders), source.format(**folders)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    student = build_student(teacher, source, str(tmp_path / "base"), lora(**config))
    assert isinstance(student, PeftModel)
    assert shared_bytes(student, teacher) == 0
    if config.get("init_lora_weights") is not False:
        torch.testing.assert_close(logits(student), logits(build_student(teacher, source)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("source", ["policy", "anchor"])
def test_an_adapter_on_a_member_with_a_model_of_its_own_shares_that(tmp_path, source):
    teacher = mixture_of_models()
    student = build_student(teacher, source, str(tmp_path), lora(r=2))
    member = teacher.policy if source == "policy" else teacher.anchors[0]
    assert shared_bytes(student, teacher) == sum(p.numel() * p.element_size() for p in member.parameters())
    assert torch.equal(logits(student), logits(member))
    student.save_pretrained(tmp_path / "student")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "student")), logits(student))


def test_moving_the_student_moves_what_the_mixture_holds(folders):
    teacher = mixture("two adapters", folders)
    student = build_student(teacher, "policy", peft_config=lora(**POLICY))
    shared = shared_bytes(student, teacher)
    student.to(torch.float64)
    assert shared_bytes(student, teacher) == 2 * shared
    teacher.to(torch.float32)
    assert shared_bytes(student, teacher) == shared


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_a_student_with_a_copy(folders, tmp_path, gradient_checkpointing):
    teacher = mixture("two adapters", folders)
    student = build_student(teacher, "policy", peft_config=lora(**POLICY))
    alone = copy.deepcopy(student)
    assert shared_bytes(alone, teacher) == 0
    options = {"gradient_checkpointing": gradient_checkpointing, "optim": "adamw_torch"}
    shared = distiller_of(tmp_path / "shared", teacher, student, **options)
    copied = distiller_of(tmp_path / "copied", mixture("two adapters", folders), alone, **options)
    batch = batch_of(shared)
    (loss, gradients), (expected, of_copy) = gradients_of(shared, batch), gradients_of(copied, batch)
    assert torch.equal(loss, expected)
    assert 0 < len(gradients) == len(of_copy)
    assert all(torch.equal(gradient, of_copy[name]) for name, gradient in gradients.items())
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    for trainer in (shared, copied):
        set_seed(0)
        trainer.train()
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)
    trained = [dict(trainer.model.named_parameters()) for trainer in (shared, copied)]
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())
    shared.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "shared")
    assert list(loaded.peft_config) == ["default"]
    assert torch.equal(logits(loaded), logits(shared.model))


def test_training_is_that_of_the_trainers_own_adapter_on_a_copy(folders, tmp_path):
    config = LoraConfig(r=3, target_modules=["q_proj"], lora_dropout=0.1)
    teacher = mixture("base anchor", folders)
    set_seed(42)  # the trainer's own
    shared = distiller_of(tmp_path / "shared", teacher, build_student(teacher, "anchor", peft_config=config))
    teacher = mixture("base anchor", folders)
    copied = distiller_of(tmp_path / "copied", teacher, "anchor", peft_config=config)
    for trainer in (shared, copied):
        set_seed(0)
        trainer.train()
    trained = [dict(trainer.model.named_parameters()) for trainer in (shared, copied)]
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())


def test_what_would_change_shared_weights_is_refused(folders, tmp_path, monkeypatch):
    teacher = mixture("two adapters", folders)
    trainer = distiller_of(tmp_path, teacher, build_student(teacher, "policy", peft_config=lora(**POLICY)))
    student = trainer.base_student(trainer.model)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="shares weights with the mixture, which FSDP or DeepSpeed would shard"):
        trainer._validate_shared_weights(student)
    monkeypatch.setattr(trainer, "use_vllm", True)
    with pytest.raises(ValueError, match="use_vllm is set, and for vLLM TRL merges the student's adapter"):
        trainer._validate_shared_weights(student)
    trainer._validate_shared_weights(build_student(teacher, "policy"))
