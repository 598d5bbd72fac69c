"""What a mixture of each causal architecture does, and the page docs/architectures.md that says so.

python -m tests.helpers.architecture_sweep   # from the root of the repository: writes the page
"""

import tempfile
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from logitmix import LogitMixForCausalLM
from tests.helpers.architectures import MODEL_TYPES, NOT_TRIED, tiny_causal_model
from tests.helpers.grpo import trainer_of
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "architectures.md"
_SHORT, _LONG = [5, 17, 9], [12, 50, 7, 33, 4]


@cache
def outcome(model_type: str) -> str:
    """`works`, or `refused: ` and the error, or `not tried: ` and the reason. Raises where something is wrong."""
    if model_type in NOT_TRIED:
        return f"not tried: {NOT_TRIED[model_type]}"
    policy, anchor = tiny_causal_model(model_type), tiny_causal_model(model_type, seed=1)
    with torch.no_grad():
        policy(input_ids=torch.tensor([_LONG]))  # otherwise the miniature would be at fault
    try:
        model = LogitMixForCausalLM.from_members(policy, anchor, alpha=0.4)
    except ValueError as error:
        return f"refused: {_one_line(error)}"
    _check_padding(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = LogitMixForCausalLM.from_pretrained(folder)
        assert_same_tensors(loaded, model)
        _train(model, folder, "reference")
        try:
            _train(loaded, folder, "fused")
        except ValueError as error:
            return f'works, with `loss_head="reference"`: {_one_line(error).partition("; score from")[0]}'
    return "works"


def _check_padding(model: PreTrainedModel) -> None:
    """Greedy tokens are the same with and without a KV cache, and alone and in a batch padded on the left."""
    alone = [_generate(model, [ids], [[1] * len(ids)])[0] for ids in (_SHORT, _LONG)]
    assert alone[0] == _generate(model, [_SHORT], [[1] * 3], use_cache=False)[0], "differs without a cache"
    padded = _generate(model, [[0, 0, *_SHORT], _LONG], [[0, 0, 1, 1, 1], [1] * 5])
    assert padded == alone, "differs with padding on the left"


def _generate(model: PreTrainedModel, ids: list[list[int]], mask: list[list[int]], **kwargs) -> list[list[int]]:
    output = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=4, do_sample=False, **kwargs
    )
    return output[:, len(ids[0]) :].tolist()


def assert_same_tensors(loaded: LogitMixForCausalLM, model: LogitMixForCausalLM) -> None:
    """Weights and buffers, persistent or not, are equal bit for bit; logits up to rounding.

    Kernels of experts and convolutions round differently at another alignment of the same weights in memory.
    """
    for kind in ("named_parameters", "named_buffers"):
        expected, found = (dict(getattr(m, kind)()) for m in (model, loaded))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name} differs after loading"
    ids = torch.tensor([_LONG])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def _train(model: LogitMixForCausalLM, folder: str, loss_head: str) -> None:
    trainer = trainer_of(
        Path(folder) / loss_head,
        model,
        prompts=["ab=", "12+34-5="],
        loss_head=loss_head,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "ratio/min" in log]
    assert trainer.state.global_step == len(logs) == 2
    assert all(abs(log[key] - 1) < 1e-4 for log in logs for key in ("ratio/min", "ratio/max")), "ratio is not 1"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def row(model_type: str, result: str) -> str:
    return f"| `{model_type}` | {result.replace('|', '/')} |"


def page(results: dict[str, str]) -> str:
    """The page for the outcome of each model type."""
    counts = {kind: sum(r.startswith(kind) for r in results.values()) for kind in ("works", "refused", "not tried")}
    return f"""# Architectures

A member of a mixture can be any causal language model of transformers that passes the checks of
`LogitMixForCausalLM.from_members`, which looks at what the model does, not at its name:

- `AutoModelForCausalLM` builds its class from its configuration, so that a saved mixture can be loaded;
- its positions do not depend on padding on the left of a batch;
- it keeps every token in the KV cache that members share;
- its logits at a token do not depend on later tokens.

Each model type of `MODEL_FOR_CAUSAL_LM_MAPPING` in transformers {version("transformers")} is built in miniature and
mixed with another of its kind. The mixture then generates, with and without a KV cache and padding, is saved and
loaded (every weight and buffer must be equal bit for bit), and trains for two GRPO steps with each loss head. Of
{len(results)} model types {counts["works"]} work, {counts["refused"]} are refused in the sentence below, and
{counts["not tried"]} are not tried. `tests/training/test_architectures.py` fails where a row is wrong;
`python -m tests.helpers.architecture_sweep` writes the page again.

| Model type | Outcome |
|---|---|
""" + "".join(row(name, result) + "\n" for name, result in results.items())


def main() -> None:
    results = {}
    for model_type in MODEL_TYPES:
        start = time.monotonic()
        try:
            results[model_type] = outcome(model_type)
        except Exception as error:
            results[model_type] = f"FAILED: {type(error).__name__}: {_one_line(error)[:300]}"
        print(f"{time.monotonic() - start:.1f} s {row(model_type, results[model_type])}", flush=True)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
