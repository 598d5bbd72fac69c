"""Flags of a LoRA adapter, under TRL's names."""

from dataclasses import dataclass, field, fields

from peft import LoraConfig
from transformers import PreTrainedModel

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.runs.folder import console


@dataclass
class AdapterArguments:
    """Train a LoRA adapter instead of the model's weights. Names and defaults are those of TRL's `ModelConfig`."""

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of the model's weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter: lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.05,
        metadata={"help": "Dropout of the adapter's input in SFT; in GRPO only with --disable_dropout false."},
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to adapt; default PEFT's for the architecture, or all-linear."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full, as copies of the model's."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead (rsLoRA)."})
    use_dora: bool = field(default=False, metadata={"help": "Train magnitude and direction separately (DoRA)."})

    @property
    def peft_config(self) -> LoraConfig | None:
        """The adapter's configuration, or None without `--use_peft`. Raises `ValueError` for flags without effect."""
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if not self.use_peft:
            if given:
                raise ValueError(f"{given[0]} is {getattr(self, given[0])!r}, but there is no adapter; add --use_peft")
            return None
        targets = self.lora_target_modules
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            # a single name may be "all-linear" or a regular expression, which PEFT takes as a string
            target_modules=targets[0] if targets is not None and len(targets) == 1 else targets,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )


def print_shared_memory(model: PreTrainedModel) -> None:
    """Print the memory that members save by sharing a base, if any do."""
    if isinstance(model, LogitMixForCausalLM) and model.anchors != model.members[1:]:
        held, saved = model.weight_bytes()
        console.print(f"Members share one base: weights take {held / 1e9:.3g} GB, not {(held + saved) / 1e9:.3g} GB.")
