"""Tiny checkpoints whose files hold quantised weights, in the formats of other programs."""

import json

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.members import character_tokenizer, tiny_member

# the weights of a scheme of compressed-tensors, the greatest number, and the format of its files
SCHEMES = {
    "int4": ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}, 7, "pack-quantized"),
    "int8": ({"num_bits": 8, "type": "int", "strategy": "channel"}, 127, "pack-quantized"),
    "fp8": ({"num_bits": 8, "type": "float", "strategy": "channel"}, 448, "naive-quantized"),
}
BLOCK = 16


def save_compressed_tensors(folder, kind):
    """A member whose linear layers, but not its head, are quantised as `kind`; return the same in float32."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    arguments, greatest, file_format = SCHEMES[kind]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), format=file_format)
    model, expected = tiny_member("qwen2", 1), tiny_member("qwen2", 1)
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format=file_format)
    )
    for path, layer in model.named_modules():
        if hasattr(layer, "weight_scale"):
            groups = layer.weight.data.reshape(*layer.weight_scale.shape, -1)
            scales = groups.abs().amax(-1, keepdim=True) / greatest
            layer.weight_scale.data.copy_(scales.squeeze(-1))
            layer.quantization_status = QuantizationStatus.FROZEN
            numbers = groups / scales
            rounded = numbers.to(torch.float8_e4m3fn).float() if kind == "fp8" else numbers.round()
            expected.get_submodule(path).weight.data = (rounded * scales).reshape(layer.weight.shape)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    character_tokenizer().save_pretrained(folder)
    return expected


def save_fp8(folder):
    """A member whose linear layers are FP8 in blocks, but not its head; return the same in float32."""
    model = tiny_member("qwen2", 1)
    linear = [f"{path}.weight" for path, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    linear.remove("lm_head.weight")
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in linear:
        rows, columns = state[name].shape
        blocks = state[name].reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = blocks.abs().amax((1, 3), keepdim=True) / 448
        rounded = (blocks / scales).to(torch.float8_e4m3fn)
        state[name] = rounded.reshape(rows, columns)
        state[name + "_scale_inv"] = scales.reshape(rows // BLOCK, columns // BLOCK)
        model.get_parameter(name).data = (rounded.float() * scales).reshape(rows, columns)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    character_tokenizer().save_pretrained(folder)
    return model
