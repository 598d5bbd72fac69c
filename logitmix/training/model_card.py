"""The model card of a trained mixture."""

from pathlib import Path

from logitmix.mixture.modeling import LogitMixForCausalLM

_CARD = """---
library_name: transformers
tags: [trl, grpo, logitmix]
---
# {folder}

A mixture of language models, scheme {config.scheme}, trained with GRPO through logit averaging
([arXiv 2605.20555](https://arxiv.org/abs/2605.20555)). Members, the policy first: {members}; weights {config.weights}.

```python
from logitmix import LogitMixForCausalLM

model = LogitMixForCausalLM.from_pretrained("{folder}")
```
"""


def write_model_card(model: LogitMixForCausalLM, folder: Path) -> None:
    """Write `README.md` beside the mixture. TRL's card names the one base model, which a mixture does not have."""
    card = _CARD.format(folder=folder.name, members=model.describe_members(), config=model.config)
    (folder / "README.md").write_text(card)
