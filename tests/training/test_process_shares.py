"""Each item goes to one process, and every process gets equally many."""

from types import SimpleNamespace

import pytest

from logitmix.training.process_shares import process_share


@pytest.mark.parametrize(("num_items", "processes"), [(1, 1), (7, 1), (6, 2), (7, 2), (3, 4), (1, 8)])
def test_every_item_has_one_process_and_shares_are_equal(num_items, processes):
    shares = [
        process_share(num_items, SimpleNamespace(process_index=rank, num_processes=processes))
        for rank in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    counted = sorted(i for share in shares for i in share if i < num_items)
    assert counted == list(range(num_items))
