"""`logitmix export`: save one member of a mixture as its own checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from logitmix.cli.options.parser import parse
from logitmix.mixture.adapters import read_adapter_config
from logitmix.mixture.loading import load_member, require_tokenizer
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.runs.folder import console


@dataclass
class ExportArguments:
    """The member to export, and its folder."""

    model_name_or_path: str = field(metadata={"help": "Folder or hub id of a mixture, or of an adapter to merge."})
    output_dir: str = field(metadata={"help": "New folder for the member."})
    member: str = field(
        default="policy", metadata={"help": "policy or anchor; with several anchors, anchor_0, anchor_1, …"}
    )
    merge: bool = field(default=False, metadata={"help": "Merge the member's adapter into its base."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Dtype of the weights; auto is the checkpoint's own."}
    )


def main(argv: Sequence[str]) -> None:
    (args,) = parse("logitmix export", "Save one member of a mixture as its own checkpoint.", (ExportArguments,), argv)
    source, folder = args.model_name_or_path, Path(args.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists; choose another --output_dir")
    if read_adapter_config(source) is not None and not args.merge:
        raise ValueError(f"{source} is an adapter by itself already; --merge puts it into its base")
    model = load_member(source, dtype=args.dtype)
    if isinstance(model, LogitMixForCausalLM):
        model.export_member(args.member, folder, args.merge)
    elif args.merge and read_adapter_config(source) is not None:
        model.save_pretrained(folder)
        require_tokenizer(source).save_pretrained(folder)
    else:
        raise ValueError(f"{source} is a single model, not a mixture; there is nothing to export")
    console.print(f"{args.member} is in {folder}.")
