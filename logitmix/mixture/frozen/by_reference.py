"""A folder that vLLM loads a mixture from, without copies of the weights that its members' own folders hold."""

import json
from pathlib import Path

from safetensors.torch import save_file

from logitmix.mixture.frozen.references import REFERENCES, WHOLE
from logitmix.mixture.frozen.sources import describe_sources, relative_to, without_source
from logitmix.mixture.frozen.store import trained_state_dict
from logitmix.mixture.modeling import LogitMixForCausalLM


def save_by_reference(mixture: LogitMixForCausalLM, folder: Path, policy: str | None = None) -> None:
    """Write a mixture to `folder`, whose `frozen.json` refers to the folders of the frozen members.

    What trains is written, also if it is as its own folder `policy` holds it and has no adapter: then `frozen.json`
    refers to that folder too. A mixture with a frozen member that has no folder to refer to is written whole.
    """
    if without_source(mixture):
        mixture.save_pretrained(folder)
        return
    paths = dict(mixture.sources)
    refers_to_policy = policy is not None and not mixture.config.adapters
    if policy is not None and refers_to_policy:
        paths["policy"] = policy
    mixture.save_pretrained(folder, state_dict={} if refers_to_policy else trained_state_dict(mixture))
    if refers_to_policy:
        save_file({}, folder / WHOLE, metadata={"format": "pt"})  # vLLM needs a file, and transformers wrote none
    references = {"store": None, "sources": relative_to(folder, describe_sources(mixture, paths))}
    (folder / REFERENCES).write_text(json.dumps(references, indent=1))
