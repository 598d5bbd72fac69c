"""The private operator of torch that the loss head calls.

`tests/loss_head/test_torch_patches.py` has its test, which fails when a new version of torch changes the operator.
"""

import torch
from torch import Tensor


def onednn_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of float32 matrices on a CPU by oneDNN: `torch.mm` always uses MKL, up to twice as slow on AMD."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return product
