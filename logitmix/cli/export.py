"""`logitmix export`: one member of a mixture as an ordinary checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from logitmix.cli.options.model import Dtype, find_model
from logitmix.cli.options.parser import parse
from logitmix.runs.console import console


@dataclass
class ExportArguments:
    """Export"""

    model_name_or_path: str = field(metadata={"help": "Folder or hub id of a mixture, or of an adapter to merge."})
    output_dir: str = field(metadata={"help": "New folder for the checkpoint."})
    member: str = field(
        default="policy",
        metadata={"help": "Member to export: policy or anchor; anchor_0, anchor_1, ... of several anchors."},
    )
    merge: bool = field(default=False, metadata={"help": "Merge the member's adapter into its base."})
    dtype: Dtype = field(default="auto", metadata={"help": "Dtype of the weights; auto: the checkpoint's own."})

    def __post_init__(self) -> None:
        self.model_name_or_path = find_model(self.model_name_or_path)


def main(argv: Sequence[str]) -> None:
    description = "Write one member of a mixture as an ordinary checkpoint, or merge an adapter into its base."
    run(parse("export", description, ExportArguments, argv))


def run(args: ExportArguments) -> None:
    from logitmix.mixture.adapters import read_adapter_config
    from logitmix.mixture.loading import load_member, require_tokenizer
    from logitmix.mixture.modeling import LogitMixForCausalLM

    source, folder = args.model_name_or_path, Path(args.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists; choose another --output_dir")
    if read_adapter_config(source) is not None and not args.merge:
        raise ValueError(f"{source} is an adapter and needs no export; add --merge to merge it into its base")
    model = load_member(source, dtype=args.dtype)
    if isinstance(model, LogitMixForCausalLM):
        model.export_member(args.member, folder, args.merge)
    elif args.merge and read_adapter_config(source) is not None:
        model.save_pretrained(folder)
        require_tokenizer(source).save_pretrained(folder)
    else:
        raise ValueError(f"{source} is a single model, without members to export; use it as it is")
    console.print(f"{args.member} is in {folder}.")
