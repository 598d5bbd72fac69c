"""The weights that a request sets by `alpha`, `weights` or `member`."""

import pytest
from transformers import LlamaConfig, Qwen2Config

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.serving.alpha_range import validate_alpha_range
from logitmix.serving.requests import parse_request_weights


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        (None, None),
        ({"alpha": None, "top_k": 5}, None),
        ({"alpha": 0.25}, [0.75, 0.25]),
        ({"weights": [0.5, 0.5], "top_k": 5}, [0.5, 0.5]),
        ({"member": "policy"}, [1.0, 0.0]),
        ({"member": "anchor"}, [0.0, 1.0]),
    ],
)
def test_the_fields_of_a_request_set_one_weight_per_member(fields, weights):
    config = LogitMixConfig.from_member_configs([Qwen2Config(), LlamaConfig()])
    assert parse_request_weights(config, fields) == weights


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 0.3, "member": "policy"}, "the request sets alpha and member; set only one of them"),
        ({"alpha": "much"}, "alpha is 'much', but must be a number"),
        ({"alpha": 10**400}, "but must be a number"),
        ({"alpha": 1.5}, r"alpha is 1\.5, but this server takes 0\.0 to 1\.0"),
        ({"weights": 0.5}, "weights is 0.5, but must be a list of numbers"),
        ({"alpha": {"anchor": 0.3}}, "alpha is {'anchor': 0.3}, but must be a number"),
        ({"weights": [[-5, 6]]}, r"weights is \[\[-5, 6\]\], but must be a list of numbers"),
        ({"weights": [None, 1]}, r"weights is \[None, 1\], but must be a list of numbers"),
        ({"weights": [0.5, 0.3, 0.2]}, "2 members"),
        ({"weights": [1.5, -0.5]}, r"alpha is -0\.5, but this server takes 0\.0 to 1\.0"),
        (
            {"member_prompts": {"anchor": "x"}},
            r"a server gives all members the same prompt, so a request cannot set member_prompts; leave it out, or",
        ),
        ({"member": "teacher"}, "there is no member 'teacher'; the members are policy, anchor_0"),
    ],
)
def test_invalid_fields_are_rejected(fields, message):
    config = LogitMixConfig.from_member_configs([Qwen2Config(), LlamaConfig()], alpha_range=[0.0, 1.0])
    with pytest.raises(ValueError, match=message):
        parse_request_weights(config, fields)


def test_a_member_alone_is_outside_no_range_of_alpha():
    config = LogitMixConfig.from_member_configs([Qwen2Config(), LlamaConfig()], alpha_range=[0.2, 0.5])
    assert parse_request_weights(config, {"member": "anchor"}) == [0.0, 1.0]
    assert parse_request_weights(config, {"alpha": 0.5}) == [0.5, 0.5]


@pytest.mark.parametrize("alpha_range", [[0.5], [0.0, 0.5, 1.0], [1.0, 0.0], [0, "1"], [False, True], 0.5, "01"])
def test_a_range_of_alpha_that_is_not_two_numbers_is_rejected(alpha_range):
    with pytest.raises(ValueError, match=r"alpha_range is .*, but must be two numbers, the lower first"):
        validate_alpha_range(alpha_range)
    validate_alpha_range([-float("inf"), 1])
