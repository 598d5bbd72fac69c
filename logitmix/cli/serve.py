"""`logitmix serve`: an OpenAI-compatible server for a mixture, with a mixture for each request.

The server is vLLM's. Without vLLM it is transformers' own, so that a laptop can try it.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.utils.import_utils import is_serve_available

from logitmix.cli.options.mixture import MixtureArguments
from logitmix.mixture.configuration import LogitMixConfig, resolve_weights
from logitmix.mixture.modeling import LogitMixForCausalLM


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
    """Become vLLM's server, or be transformers'. Raises `ValueError` where there is no mixture, or no server."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--model_name_or_path")
    parser = HfArgumentParser(ServeArguments, prog="logitmix serve", allow_abbrev=False)
    args, flags = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    require_sound(args, flags)
    if find_spec("vllm") is None:
        serve_without_vllm(args, flags)
    else:
        command = server_command(args, flags)
        os.execv(command[0], command)


def require_sound(args: ServeArguments, flags: Sequence[str]) -> None:
    if not args.model_name_or_path:
        raise ValueError("logitmix serve needs the folder of a mixture, as its first word")
    if len(args.alpha_range) != 2 or args.alpha_range[0] > args.alpha_range[1]:
        raise ValueError(f"alpha_range is {args.alpha_range}, but must be two numbers, the lower first")
    if args.alpha is not None and not args.alpha_range[0] <= args.alpha <= args.alpha_range[1]:
        raise ValueError(f"alpha is {args.alpha}, but alpha_range is {args.alpha_range}; widen that")
    # in each of the ways in which vLLM takes it: it would replace ours
    if any(re.match(r"--hf[-_]overrides($|[=.])", flag) for flag in flags):
        raise ValueError("--hf-overrides is taken by --alpha, --scheme and --alpha_range; leave it out")
    if any(re.match(r"--model($|=)", flag) for flag in flags):
        raise ValueError("--model is taken by the first word of logitmix serve; leave it out")


def server_command(args: ServeArguments, vllm_flags: Sequence[str]) -> list[str]:
    folder = args.model_name_or_path if args.anchor is None else save_mixture(args)
    overrides = settings(args, folder)
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder),
        *("--middleware", "logitmix.serving.http.MixtureFields", "--hf-overrides", json.dumps(overrides)),
        *vllm_flags,
    ]


def serve_without_vllm(args: ServeArguments, flags: Sequence[str]) -> None:
    """Raises `ValueError` where transformers' server is not installed either, and for flags that are vLLM's."""
    if not is_serve_available():
        raise ValueError(
            "vLLM is not installed, which logitmix serve needs: pip install vllm; to try it on a laptop, "
            "transformers' own server will do: pip install 'logitmix[serve]'"
        )
    parser = argparse.ArgumentParser(prog="logitmix serve", allow_abbrev=False)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name")
    server, vllm_flags = parser.parse_known_args(flags)
    if vllm_flags:
        raise ValueError(f"vLLM is not installed, which {vllm_flags[0]} is for: pip install vllm, or leave it out")
    from logitmix.serving.without_vllm import serve

    folder = args.model_name_or_path if args.anchor is None else save_mixture(args)
    overrides = settings(args, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(PartialState().device).eval()
    for name, value in overrides.items():
        setattr(model.config, name, value)
    print(
        "logitmix: vLLM is not installed, so transformers' own server answers: one request at a time, without "
        "log-probabilities, n > 1, member_logprobs and /metrics; for these, pip install vllm",
        file=sys.stderr,
    )
    serve(model, AutoTokenizer.from_pretrained(folder), server.served_model_name or folder, server.host, server.port)


def settings(args: ServeArguments, folder: str) -> dict[str, Any]:
    """What the server's configuration has in place of the checkpoint's: weights, scheme, and what requests may ask."""
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, LogitMixConfig):
        raise ValueError(f"{folder} is no mixture; give --anchor to mix it with, or serve it with vLLM itself")
    scheme = args.scheme or config.scheme
    weights = resolve_weights(args.alpha, None, len(config.members), scheme, config.weights)
    return {"weights": weights.tolist(), "scheme": scheme, "alpha_range": args.alpha_range}


def save_mixture(args: ServeArguments) -> str:
    """The folder of the mixture of the model with `--anchor`."""
    if args.output_dir is None:
        raise ValueError("with --anchor, --output_dir has to name a new folder for the mixture, which vLLM reads")
    if Path(args.output_dir).exists():
        raise ValueError(f"{args.output_dir} exists; serve it as it is, or choose another --output_dir")
    mixture = LogitMixForCausalLM.from_members(
        args.model_name_or_path, str(args.anchor), args.alpha, scheme=args.scheme or "logit", dtype="auto"
    )
    mixture.save_pretrained(args.output_dir)
    return args.output_dir
