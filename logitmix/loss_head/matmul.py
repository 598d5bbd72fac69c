"""The matrix products of the fused loss head: accumulated in float32 whatever the dtype of their factors."""

import torch
from torch import Tensor

from logitmix.loss_head.libraries import Product, choose_library
from logitmix.loss_head.torch_patches import onednn_matmul


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype, half_dtype: torch.dtype | None = None) -> Tensor:
    """`a @ b`, the logits of a tile, accumulated in `dtype`. A CUDA device multiplies in `half_dtype` if given."""
    if half_dtype is not None and a.is_cuda:
        return torch.mm(a.to(half_dtype), b.to(half_dtype), out_dtype=dtype)
    a, b = a.to(dtype), b.to(dtype)  # in half precision a CPU would round the sums as well
    return onednn_matmul(a, b) if _use_onednn("logits", a, b) else a @ b


def add_product(
    out: Tensor, a: Tensor, b: Tensor, half_dtype: torch.dtype | None = None, product: Product = "logits"
) -> None:
    """`out += a @ b`, with the precision of `multiply`."""
    if half_dtype is not None and out.is_cuda:
        torch.addmm(out, a.to(half_dtype), b.to(half_dtype), out_dtype=out.dtype, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    if _use_onednn(product, a, b):
        out.add_(onednn_matmul(a, b))
    else:
        out.addmm_(a, b)


def _use_onednn(product: Product, a: Tensor, b: Tensor) -> bool:
    if a.device.type != "cpu" or a.dtype != torch.float32:
        return False
    rows, width = {
        "logits": (b.shape[1], a.shape[1]),
        "hidden_gradient": (b.shape[0], b.shape[1]),
        "weight_gradient": (a.shape[0], b.shape[1]),
    }[product]
    return choose_library(product, rows, width) == "oneDNN"
