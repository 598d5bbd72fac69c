"""Left-padded batches."""

import torch

from logitmix.mixture.padding import left_pad, position_ids_from_mask


def test_position_ids_number_the_real_tokens_of_a_left_padded_batch():
    ids, mask = left_pad([[5, 6, 7], [8]], pad_token_id=0, device=torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert position_ids_from_mask(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
