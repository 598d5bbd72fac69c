"""How processes share questions to decode."""

import math

from accelerate import Accelerator


def process_share(num_items: int, accelerator: Accelerator) -> list[int]:
    """The indices of the items of this process: those of rank r among P processes are r, r + P, r + 2P, …

    Every process gets equally many, as sharded weights are gathered in step. So the indices may exceed `num_items`:
    item `i % num_items` then repeats one of another process, and is not counted.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    return [rank + i * processes for i in range(math.ceil(num_items / processes))]
