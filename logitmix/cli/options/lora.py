"""Flags for a LoRA adapter, with TRL's names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass
class AdapterArguments:
    """LoRA adapter

    Names and defaults are those of TRL's `ModelConfig`.
    """

    use_peft: bool = field(
        default=False, metadata={"help": "Train a LoRA adapter instead of the model's own weights."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.05,
        metadata={"help": "Dropout on the adapter's input; in GRPO only with --disable_dropout false."},
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to adapt, or all-linear; default: PEFT's for the architecture."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full, as a copy of the model's own."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead."})
    use_dora: bool = field(default=False, metadata={"help": "Train magnitude and direction separately (DoRA)."})

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if given and not self.use_peft:
            raise ValueError(f"{given[0]} is {getattr(self, given[0])!r}, but there is no adapter; add --use_peft")

    @property
    def peft_config(self) -> LoraConfig | None:
        """None without `--use_peft`. Raises `ValueError` for values that PEFT rejects."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=_peft_targets(self.lora_target_modules),
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )


def _peft_targets(names: list[str] | None) -> list[str] | str | None:
    """The targets as PEFT takes them: names as a list; "all-linear" or a single regular expression as a string."""
    if names is None or len(names) != 1:
        return names
    (name,) = names
    return [name] if name != "all-linear" and re.fullmatch(r"\w+(\.\w+)*", name) else name
