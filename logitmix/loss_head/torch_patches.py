"""The product of float32 matrices by the private operator of torch that calls oneDNN.

`tests/loss_head/test_torch_patches.py` has its test, which fails when a new version of torch changes the operator.
"""

from torch import Tensor

from logitmix.mixture.torch_patches import onednn_linear


def onednn_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of float32 matrices on a CPU by oneDNN: `torch.mm` always uses MKL, up to twice as slow on AMD."""
    return onednn_linear(a, b.T)
