"""`logitmix serve`: an OpenAI-compatible server for a mixture, in which each request may choose its own alpha.

The server is vLLM's. Where vLLM is not installed, it is the one of transformers, which suffices to try it on a laptop.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trl import TrlParser

from logitmix.cli.options.evaluation import DECODING_HELP, Decoding
from logitmix.cli.options.help import asks_for_help, print_help
from logitmix.cli.options.model import MixtureArguments, find_model
from logitmix.serving.alpha_range import validate_alpha_range

UNSAVED = "mixture"  # the name, in requests, of a mixture that has no folder of its own


@dataclass
class ServeArguments(MixtureArguments):
    """Mixture and requests"""

    model_name_or_path: str = field(
        default="", metadata={"help": "Folder or hub id of a mixture, or of the policy if --anchor is set."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "With --anchor: new folder to save the mixture in."}
    )
    alpha_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0], metadata={"help": "Lowest and highest alpha that a request may choose."}
    )
    decoding: Decoding = field(
        default="auto",
        metadata={"help": f"{DECODING_HELP} With vLLM, auto is joint; alternating needs two full members."},
    )
    draft_member: str | None = field(
        default=None,
        metadata={"help": "With vLLM, the member that drafts if the mixture is its own draft model; default: policy."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model_name_or_path = find_model(self.model_name_or_path) if self.model_name_or_path else ""


@dataclass
class ServerArguments:
    """Server"""

    host: str = field(default="localhost", metadata={"help": "Address to listen on; with vLLM the default is all."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    served_model_name: str | None = field(
        default=None, metadata={"help": "Name of the model in requests; default: MODEL as given."}
    )


@dataclass
class VllmArguments:
    """Server, with vLLM: the flags that most servers set"""

    tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs to split each layer over."})
    dtype: str = field(default="auto", metadata={"help": "Precision of the weights: bfloat16, float16, float32."})
    max_model_len: int | None = field(
        default=None, metadata={"help": "Longest context, in tokens; default: the members' own."}
    )
    max_num_seqs: int | None = field(default=None, metadata={"help": "Requests that run at the same time."})
    gpu_memory_utilization: float | None = field(
        default=None, metadata={"help": "Part of the GPU's memory for the weights and the KV cache of all members."}
    )
    speculative_config: str | None = field(
        default=None,
        metadata={"help": "Drafts that the mixture verifies, as JSON with method, model and num_speculative_tokens."},
    )
    api_key: str | None = field(default=None, metadata={"help": "Key that requests must present."})


def main(argv: Sequence[str]) -> None:
    """Replace this process by vLLM's server, or run the one of transformers."""
    if asks_for_help(argv):
        print_help(
            "serve",
            "Serve a mixture over an OpenAI-compatible API; each request may set its own alpha.",
            [ServeArguments, ServerArguments, VllmArguments],
            ("model_name_or_path", "MODEL"),
            footer="A request sets alpha, weights or member in its JSON body, and with vLLM member_logprobs. With "
            "vLLM installed, every other flag goes to its server, which lists them: python -m "
            "vllm.entrypoints.openai.api_server --help=all. Without vLLM there are no others, nor those of vLLM.",
        )
        return
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--model_name_or_path")
    parser = TrlParser(ServeArguments, prog="logitmix serve", allow_abbrev=False)
    args, flags = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    validate_arguments(args, flags)
    if find_spec("vllm") is None:
        serve_without_vllm(args, flags)
    else:
        command = vllm_command(args, flags)
        os.execv(command[0], command)


def validate_arguments(args: ServeArguments, flags: Sequence[str]) -> None:
    """Raise `ValueError` for a missing model, an invalid alpha, and flags of vLLM that `ServeArguments` replaces."""
    if not args.model_name_or_path:
        raise ValueError("logitmix serve needs the folder of a mixture as its first argument")
    validate_alpha_range(args.alpha_range)
    if args.alpha is not None and not args.alpha_range[0] <= args.alpha <= args.alpha_range[1]:
        raise ValueError(f"alpha is {args.alpha}, but alpha_range is {args.alpha_range}; widen the range")
    # every spelling that vLLM accepts: each would replace the settings of the mixture
    if any(re.match(r"--hf[-_]overrides($|[=.])", flag) for flag in flags):
        raise ValueError("--hf-overrides is set from --alpha, --scheme and --alpha_range; leave it out")
    if any(re.match(r"--model($|=)", flag) for flag in flags):
        raise ValueError("--model is set from the first argument of logitmix serve; leave it out")


def vllm_command(args: ServeArguments, vllm_flags: Sequence[str]) -> list[str]:
    """The command line of vLLM's server. With `--anchor` the mixture is first saved, or set up in a folder."""
    folder = args.model_name_or_path if args.anchor is None else save_mixture(args)
    is_unsaved = args.anchor is not None and args.output_dir is None
    is_named = any(re.match(r"--served[-_]model[-_]name($|=)", flag) for flag in vllm_flags)
    overrides = config_overrides(args, read_config(folder))
    if not any(re.match(r"--tokenizer($|=)", flag) for flag in vllm_flags):
        validate_tokenizer(folder)
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder),
        *("--middleware", "logitmix.serving.http.MixtureFields", "--hf-overrides", json.dumps(overrides)),
        # vLLM's own defaults: a checkpoint's generation_config gives the end tokens and no sampling parameter
        *("--generation-config", "vllm"),
        *(["--served-model-name", UNSAVED] if is_unsaved and not is_named else []),
        *(alternating_flags() if args.decoding == "alternating" else []),
        *vllm_flags,
    ]


def alternating_flags() -> list[str]:
    """The flags of vLLM's server that turn on alternating decoding."""
    from logitmix.serving.alternating import alternating_decoding

    flags = []
    for name, value in alternating_decoding().items():
        flag = name.replace("_", "-")
        if value is False:
            flags.append(f"--no-{flag}")
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else value]
    return flags


def validate_tokenizer(folder: str) -> None:
    """Raise `ValueError` if vLLM, which loads the tokenizer itself, would end each prompt with EOS."""
    from logitmix.mixture.loading import read_tokenizer
    from logitmix.mixture.tokenizers import validate_texts_open

    tokenizer = read_tokenizer(folder)
    if tokenizer is not None:
        validate_texts_open(tokenizer)


def is_serve_available() -> bool:
    """Whether the server of transformers is installed. transformers takes a second to import, which --help spares."""
    from transformers.utils.import_utils import is_serve_available as is_available

    return is_available()


def serve_without_vllm(args: ServeArguments, flags: Sequence[str]) -> None:
    """Run the server of transformers. Raises `ValueError` if that is not installed either, and for flags of vLLM."""
    if not is_serve_available():
        raise ValueError(
            "vLLM is not installed, which logitmix serve needs: pip install vllm; to try it on a laptop, the server "
            "of transformers is enough: pip install 'logitmix[serve]'"
        )
    if args.draft_member is not None:
        raise ValueError("vLLM is not installed, which --draft_member is for: pip install vllm, or leave it out")
    parser = TrlParser(ServerArguments, prog="logitmix serve", allow_abbrev=False)
    server, vllm_flags = parser.parse_args_into_dataclasses(list(flags), return_remaining_strings=True)
    if vllm_flags:
        raise ValueError(f"vLLM is not installed, which {vllm_flags[0]} is for: pip install vllm, or leave it out")

    from accelerate import PartialState

    from logitmix.mixture.loading import load_member, require_tokenizer
    from logitmix.serving.without_vllm import serve

    if args.anchor is not None and args.output_dir is None:
        folder, name, model = args.model_name_or_path, UNSAVED, mixture_of(args)
        config = model.config
    else:
        folder = name = args.model_name_or_path if args.anchor is None else save_mixture(args)
        config = read_config(folder)
        model = load_member(folder, dtype="auto")
    model = model.to(PartialState().device).eval()
    for key, value in config_overrides(args, config).items():
        setattr(model.config, key, value)
    print(
        "logitmix: vLLM is not installed, so the server of transformers runs instead: one request at a time, without "
        "log-probabilities, n > 1, member_logprobs and /metrics; for these, pip install vllm",
        file=sys.stderr,
    )
    tokenizer = require_tokenizer(folder)
    serve(model, tokenizer, server.served_model_name or name, server.host, server.port, args.decoding)


def read_config(folder: str) -> Any:
    """The configuration of the mixture at a folder or hub id. Raises `ValueError` if it is not a mixture."""
    from transformers import AutoConfig

    import logitmix.mixture.modeling  # noqa: F401  registers the configuration with transformers
    from logitmix.mixture.configuration import LogitMixConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(config, LogitMixConfig):
        raise ValueError(f"{folder} is not a mixture; give --anchor to mix it with, or serve it with vLLM itself")
    return config


def config_overrides(args: ServeArguments, config: Any) -> dict[str, Any]:
    """The values of a mixture's configuration that the flags set: weights, scheme, the range of alpha, and a draft's.

    Raises `ValueError` for values outside the scheme's domain, and an unknown member.
    """
    from logitmix.mixture.configuration import resolve_weights

    scheme = args.scheme or config.scheme
    weights = resolve_weights(args.alpha, None, len(config.members), scheme, config.weights)
    draft = {} if args.draft_member is None else {"draft_member": config.resolve_member_name(args.draft_member)}
    return {"weights": weights.tolist(), "scheme": scheme, "alpha_range": args.alpha_range} | draft


def mixture_of(args: ServeArguments) -> Any:
    """The mixture of the model with `--anchor`."""
    from logitmix.mixture.modeling import LogitMixForCausalLM

    return LogitMixForCausalLM.from_members(
        args.model_name_or_path, str(args.anchor), args.alpha, scheme=args.scheme or "logit", dtype="auto"
    )


def save_mixture(args: ServeArguments) -> str:
    """Save the mixture of the model with `--anchor`, and return its folder.

    Without `--output_dir`, it is a temporary folder with references to the two instead of their weights.
    """
    from logitmix.mixture.frozen.by_reference import save_by_reference

    if args.output_dir is not None and Path(args.output_dir).exists():
        raise ValueError(f"{args.output_dir} exists; serve it as it is, or choose another --output_dir")
    mixture = mixture_of(args)
    if args.output_dir is not None:
        mixture.save_pretrained(args.output_dir)
        return args.output_dir
    if mixture.config.quantized_models:
        raise ValueError(
            f"{mixture.config.quantized_models[0]} has quantised weights, and vLLM holds the members of a mixture in "
            "one dtype; give the model that it was quantised from"
        )
    folder, policy = tempfile.mkdtemp(prefix="logitmix-serve-"), args.model_name_or_path
    save_by_reference(mixture, Path(folder), os.path.abspath(policy) if os.path.isdir(policy) else policy)
    return folder
