"""Flags that name a checkpoint and say how to load it."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class LoadingArguments:
    """How a checkpoint is loaded."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Dtype of the weights; auto is the checkpoint's own."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel: sdpa, eager, flash_attention_2, …"}
    )

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`."""
        return {"dtype": self.dtype, "attn_implementation": self.attn_implementation}


@dataclass(kw_only=True)
class ModelArguments(LoadingArguments):
    """Which checkpoint, and how it is loaded."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or hub id of the model; in training, of the policy's start."}
    )
