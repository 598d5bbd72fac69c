"""`logitmix serve`: vLLM's OpenAI-compatible server for a mixture, with a mixture for each request."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, HfArgumentParser

from logitmix.commands.mixtures import MixtureArguments
from logitmix.configuration import LogitMixConfig, resolve_weights
from logitmix.modeling import LogitMixForCausalLM


@dataclass
class ServeArguments(MixtureArguments):
    """What is served. All other flags are vLLM's."""

    model_name_or_path: str = field(
        default="", metadata={"help": "Folder or hub id of a mixture, or with --anchor of the policy."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "With --anchor: the new folder in which the mixture is saved, to be served."}
    )
    alpha_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0], metadata={"help": "LOW HIGH: the alpha that requests may ask for."}
    )


def main(argv: Sequence[str]) -> None:
    """Become vLLM's server. Raises `ValueError` where there is no mixture to serve, or no vLLM to serve it with."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--model_name_or_path")
    parser = HfArgumentParser(ServeArguments, prog="logitmix serve", allow_abbrev=False)
    args, vllm_flags = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    command = server_command(args, vllm_flags)
    os.execv(command[0], command)


def server_command(args: ServeArguments, vllm_flags: Sequence[str]) -> list[str]:
    if not args.model_name_or_path:
        raise ValueError("logitmix serve needs the folder of a mixture, as its first word")
    if len(args.alpha_range) != 2 or args.alpha_range[0] > args.alpha_range[1]:
        raise ValueError(f"alpha_range is {args.alpha_range}, but must be two numbers, the lower first")
    if "--hf-overrides" in vllm_flags:
        raise ValueError("--hf-overrides is taken by --alpha, --scheme and --alpha_range; leave it out")
    if find_spec("vllm") is None:
        raise ValueError("vLLM is not installed, which logitmix serve needs: pip install vllm")
    folder = args.model_name_or_path if args.anchor is None else save_mixture(args)
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, LogitMixConfig):
        raise ValueError(f"{folder} is no mixture; give --anchor to mix it with, or serve it with vLLM itself")
    config.scheme = args.scheme or config.scheme
    weights = resolve_weights(args.alpha, None, len(config.members), config.scheme, config.weights)
    overrides: dict[str, Any] = {"weights": weights.tolist(), "scheme": config.scheme, "alpha_range": args.alpha_range}
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder),
        *("--middleware", "logitmix.serving.http.MixtureFields", "--hf-overrides", json.dumps(overrides)),
        *vllm_flags,
    ]


def save_mixture(args: ServeArguments) -> str:
    """The folder of the mixture of the model with `--anchor`."""
    if args.output_dir is None:
        raise ValueError("with --anchor, --output_dir has to name a new folder for the mixture, which vLLM reads")
    if Path(args.output_dir).exists():
        raise ValueError(f"{args.output_dir} exists; serve it as it is, or choose another --output_dir")
    mixture = LogitMixForCausalLM.from_members(args.model_name_or_path, str(args.anchor), args.alpha, dtype="auto")
    mixture.save_pretrained(args.output_dir)
    return args.output_dir
