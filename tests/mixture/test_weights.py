"""Valid and invalid weights of a mixture."""

import math

import pytest
import torch

from logitmix.mixture.mixing import SCHEMES, alpha_to_weights, mix_logits, validate_weights

INF = torch.inf
B, T, V = 3, 4, 7
both_schemes = pytest.mark.parametrize("scheme", SCHEMES)


def test_alpha_to_weights():
    assert alpha_to_weights(0.25).tolist() == [0.75, 0.25]
    assert alpha_to_weights([0.0, 1.0, 0.5]).tolist() == [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    assert alpha_to_weights(torch.tensor([0.5])).shape == (1, 2)
    assert alpha_to_weights(0.5).dtype == torch.float64


def test_alpha_with_too_many_axes_is_rejected():
    with pytest.raises(ValueError, match=r"alpha has shape \[2, 1\]; pass one number, or one number for each"):
        alpha_to_weights(torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("weights", "num_members", "scheme", "message"),
    [
        ([0.5, 0.5], 2, "mean", r"scheme is 'mean'; it must be one of 'logit', 'prob'"),
        ([0.5, 0.5], 3, "logit", r"weights have shape \[2\] for 3 members; pass 3 numbers, or one row of 3"),
        ([[0.5, 0.5]], 3, "logit", r"weights have shape \[1, 2\] for 3 members"),
        (0.5, 2, "logit", r"weights have shape \[\] for 2 members"),
        (torch.zeros(1, 1, 2), 2, "logit", r"weights have shape \[1, 1, 2\] for 2 members"),
        ([0.5, math.nan], 2, "logit", r"weights are not finite: \[0.5, nan\]"),
        ([math.inf, -math.inf], 2, "logit", r"weights are not finite: \[inf, -inf\]"),
        ([0.5, math.nan], 2, "prob", r"weights are not finite"),
        ([1.0, 1e300], 2, "logit", r"weights are \[1.0, 1e\+300\], but must be at most 1e\+30 in size"),
        ([1.5, -0.5], 2, "prob", r"needs weights >= 0 that sum to 1 \(alpha within \[0, 1\]\), got \[1.5, -0.5\]"),
        ([0.5, 0.4], 2, "prob", r"got \[0.5, 0.4\]; scheme 'logit' takes any real weights"),
        ([[0.5, 0.5], [0.6, 0.5]], 2, "prob", r"needs weights >= 0 that sum to 1"),
    ],
)
def test_invalid_weights_are_rejected(weights, num_members, scheme, message):
    with pytest.raises(ValueError, match=message):
        validate_weights(weights, num_members, scheme)
    with pytest.raises(ValueError, match=message):
        mix_logits([torch.zeros(2, V)] * num_members, weights, scheme)


@both_schemes
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_weights_for_another_batch_are_rejected(scheme, rows):
    with pytest.raises(ValueError, match=f"weights have {rows} rows for a batch of 2 sequences"):
        mix_logits([torch.zeros(2, V)] * 2, [[0.5, 0.5]] * rows, scheme)


def test_valid_weights():
    assert validate_weights([1, 2, -2], 3, "logit").tolist() == [1, 2, -2]
    assert validate_weights(torch.tensor([1 / 3] * 3), 3, "prob").shape == (
        3,
    )  # float32 thirds do not sum to 1 exactly
    assert validate_weights([[0.5, 0.5]] * 4, 2, "prob", batch=4).shape == (4, 2)
