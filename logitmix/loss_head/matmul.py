"""The matrix products of the fused loss head: accumulated in float32 whatever the dtype of their factors."""

import torch
from torch import Tensor

from logitmix.loss_head.torch_patches import onednn_matmul


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype, half_dtype: torch.dtype | None = None) -> Tensor:
    """`a @ b`, accumulated in `dtype`. A CUDA device multiplies in `half_dtype` if given."""
    if half_dtype is not None and a.is_cuda:
        return torch.mm(a.to(half_dtype), b.to(half_dtype), out_dtype=dtype)
    a, b = a.to(dtype), b.to(dtype)  # in half precision a CPU would round the sums as well
    return onednn_matmul(a, b) if _use_onednn(a) else a @ b


def add_product(out: Tensor, a: Tensor, b: Tensor, half_dtype: torch.dtype | None = None) -> None:
    """`out += a @ b`, with the precision of `multiply`."""
    if half_dtype is not None and out.is_cuda:
        torch.addmm(out, a.to(half_dtype), b.to(half_dtype), out_dtype=out.dtype, out=out)
    elif _use_onednn(out):
        out.add_(multiply(a, b, out.dtype))
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _use_onednn(like: Tensor) -> bool:
    """Whether oneDNN multiplies: up to twice as fast as MKL, which uses AVX-512 only on CPUs of Intel."""
    is_enabled = like.device.type == "cpu" and like.dtype == torch.float32 and bool(torch.backends.mkldnn.enabled)
    return is_enabled and torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
