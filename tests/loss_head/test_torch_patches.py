"""Contracts with torch: the private operator that the loss head calls."""

from importlib.metadata import version

import pytest
import torch

from logitmix.loss_head import matmul
from logitmix.loss_head.torch_patches import onednn_matmul
from tests.helpers.contracts import assert_has

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@needs_onednn
def test_torch_has_the_operator_with_the_arguments_that_we_pass():
    assert_has("torch", torch.ops.mkldnn, "_linear_pointwise")
    schema = torch.ops.mkldnn._linear_pointwise.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names == ["X", "W", "B", "attr", "scalars", "algorithm"], (
        f"torch {version('torch')}: mkldnn._linear_pointwise takes {names}"
    )


@needs_onednn
@pytest.mark.parametrize(("tokens", "rows", "width"), [(1, 1, 1), (1, 2048, 33), (7, 100, 1), (128, 2047, 64)])
def test_onednn_multiplies_the_layouts_of_the_passes(tokens, rows, width):
    """It takes strided factors and accumulates in float32."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, width), torch.randn(rows, width)
    masses = torch.randn(tokens, rows + 5)[:, :rows]
    for a, b in ((hidden, weight.T), (masses, weight), (masses.T, hidden)):
        start, expected = torch.randn(len(a), b.shape[1]), a.double() @ b.double()
        torch.testing.assert_close(onednn_matmul(a, b).double(), expected, rtol=1e-5, atol=5e-4)
        torch.testing.assert_close(matmul.multiply(a, b, torch.float32).double(), expected, rtol=1e-5, atol=5e-4)
        matmul.add_product(out := start.clone(), a, b)
        torch.testing.assert_close(out.double(), start.double() + expected, rtol=1e-5, atol=5e-4)
