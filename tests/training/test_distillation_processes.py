"""Two processes distil like one: the gradient of an update is that of all their completions."""

import pytest
import torch

from tests.helpers.distill import distiller_of, pair_to_distil
from tests.helpers.torchrun import run_two_processes

pytestmark = pytest.mark.slow

SCRIPT = """
    import sys
    import torch
    from pathlib import Path
    from accelerate import PartialState
    from logitmix.training.student_adapters import shared_bytes
    from tests.helpers.distill import distiller_of, pair_to_distil
    from tests.helpers.two_processes import use_fsdp2, whole

    folder, sharded, on_one_base = Path(sys.argv[1]), {sharded}, {on_one_base}
    state = PartialState(cpu=True)
    if sharded:
        use_fsdp2()
    options = dict(sharded=sharded, optim="sgd", lr_scheduler_type="constant", learning_rate=0.1)
    options |= dict(max_grad_norm=0.0, max_steps=2, per_device_train_batch_size=3)
    trainer = distiller_of(folder, *pair_to_distil(on_one_base), save_strategy="steps", save_steps=1, **options)
    sampled = []
    sample = trainer.sample
    def record(prompt_ids, *args, **kwargs):
        completions = sample(prompt_ids, *args, **kwargs)
        sampled.append([prompt_ids, completions])
        return completions
    trainer.sample = record
    trainer.train()
    assert trainer.is_fsdp_enabled == sharded
    after = {{name.removeprefix("module."): whole(p) for name, p in trainer.model.named_parameters()}}
    again = distiller_of(folder, *pair_to_distil(on_one_base), **options)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    resumed = {{name.removeprefix("module."): whole(p) for name, p in again.model.named_parameters()}}
    same = all(torch.equal(after[name], resumed[name]) for name in after)
    assert (shared_bytes(trainer.model, trainer.teacher) > 0) == on_one_base
    if sharded:
        try:
            distiller_of(folder, *pair_to_distil(True), **options)
        except ValueError as error:
            print(error)
    torch.save([sampled, after, same], folder / f"{{state.process_index}}.pt")
"""
REFUSED = "the student shares weights with the mixture, which FSDP or DeepSpeed would shard; build the student without"


@pytest.mark.parametrize(("sharded", "on_one_base"), [(False, False), (True, False), (False, True)])
def test_two_processes_distil_like_one_on_their_completions(tmp_path, sharded, on_one_base):
    output = run_two_processes(SCRIPT.format(sharded=sharded, on_one_base=on_one_base), tmp_path)
    assert output.count(REFUSED) == (2 if sharded else 0)
    records = [torch.load(tmp_path / "run" / f"{rank}.pt") for rank in (0, 1)]
    assert [same for *_, same in records] == [True, True], "resumed from its first step"
    alone = distiller_of(tmp_path / "alone", *pair_to_distil(on_one_base), per_device_train_batch_size=6)
    optimizer = torch.optim.SGD(alone.model.parameters(), lr=0.1)
    first, second = (sampled for sampled, *_ in records)
    assert len(first) == len(second) == 2
    for updates in zip(first, second, strict=True):
        prompts, completions = ([ids for update in updates for ids in update[i]] for i in (0, 1))
        alone.sample = lambda *args, completions=completions, **kwargs: completions
        texts = alone.processing_class.batch_decode(prompts)
        alone.model.train()
        batch = alone._generate_and_score_completions([{"prompt": text} for text in texts])
        optimizer.zero_grad()
        alone.compute_loss(alone.model, batch, num_items_in_batch=batch["num_items_in_batch"]).backward()
        optimizer.step()
    expected = dict(alone.model.named_parameters())
    for _, weights, _ in records:
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name].detach(), rtol=1e-4, atol=1e-5)
