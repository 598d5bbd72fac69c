"""The model card of a trained model: a mixture's own, and TRL's for a single model."""

from pathlib import Path
from typing import Any

from logitmix.mixture.modeling import LogitMixForCausalLM

_CARD = """---
library_name: transformers
tags: [trl, grpo, logitmix]
---
# {folder}

A mixture of language models, scheme {config.scheme}, trained with GRPO through logit averaging
([arXiv 2605.20555](https://arxiv.org/abs/2605.20555)). Members, the policy first: {members}.

```python
from logitmix import LogitMixForCausalLM

model = LogitMixForCausalLM.from_pretrained("{folder}")
```
"""


def write_model_card(model: LogitMixForCausalLM, folder: Path) -> None:
    """Write `README.md` beside the mixture. TRL's card names the one base model, which a mixture does not have."""
    weights = (f"{weight:.6g}" for weight in model.config.weights)
    members = (f"{name} (weight {w})" for name, w in zip(model.describe_members(), weights, strict=True))
    card = _CARD.format(folder=folder.name, members=", ".join(members), config=model.config)
    (folder / "README.md").write_text(card)


class NamesLocalModels:
    """A mixin of TRL's trainers: TRL's card calls a model from a folder, and one that is not on the hub, None."""

    model: Any
    args: Any

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        path = Path(self.args.output_dir, "README.md")
        if self.args.process_index == 0:
            base = f"`{self.model.name_or_path}`" if self.model.name_or_path else "a model in memory"
            card = path.read_text().replace("[None](https://huggingface.co/None)", base)
            path.write_text(card.replace('model="None"', f'model="{path.parent.name}"'))
