"""Which library multiplies float32 matrices on a CPU, by a measurement: that of `torch.mm`, or oneDNN.

Neither is always the faster one: against `torch.mm` with MKL, oneDNN needs half the time on some processors of AMD,
the same on others, and up to 1.8 times as long on Intel's. The two round differently, so the choice for a class of
shapes is made once in a process, at its first product, and `read_choices` and `restore_choices` carry it over to the
process that resumes a run.
"""

import math
import time
from typing import Literal

import torch

from logitmix.loss_head.torch_patches import onednn_matmul
from logitmix.mixture.torch_patches import has_onednn

Product = Literal["logits", "hidden_gradient", "weight_gradient"]
Library = Literal["torch.mm", "oneDNN"]
ShapeClass = tuple[Product, int, int]
"""A product, the width of the hidden states, and the threads that compute it.

The number of tokens is not part of it: scoring and its update, whose chunks differ, use the same library.
"""

# oneDNN is chosen where it is at least this many times as fast: libraries that are about as fast as each other must
# not lead two runs of one seed to different roundings
_CLEARLY_FASTER = 1.25
# A tile of fewer elements takes no time worth a measurement
_LEAST_ELEMENTS = 1 << 16
_TOKENS, _ROWS = 128, 2048  # of the measured products: a typical chunk and tile
_ROUNDS = 6

_choices: dict[ShapeClass, Library] = {}


def choose_library(product: Product, rows: int, width: int) -> Library:
    """The library for a float32 product with a tile `[rows, width]` of a head; measured if its class is new."""
    if rows * width < _LEAST_ELEMENTS or not has_onednn():
        return "torch.mm"
    shape_class = (product, width, torch.get_num_threads())
    if shape_class not in _choices:
        seconds = measure(product, width)
        is_clear = seconds["torch.mm"] > _CLEARLY_FASTER * seconds["oneDNN"]
        _choices[shape_class] = "oneDNN" if is_clear else "torch.mm"
    return _choices[shape_class]


def choose_libraries(rows: int, width: int) -> dict[Product, Library]:
    """The library of each product with a head `[rows, width]`."""
    products: tuple[Product, ...] = ("logits", "hidden_gradient", "weight_gradient")
    return {product: choose_library(product, min(rows, _ROWS), width) for product in products}


def read_choices() -> dict[ShapeClass, Library]:
    """The choices of this process, in plain containers."""
    return dict(_choices)


def restore_choices(choices: dict[ShapeClass, Library]) -> None:
    """Set the choices of another process, in place of this one's measurements."""
    _choices.update(choices)


def measure(product: Product, width: int) -> dict[Library, float]:
    """The least processor time in which each library adds one product of a typical chunk and tile, in seconds.

    Processor time, because other programs on the machine lengthen the time on the clock several times over.
    """
    hidden, weight, masses = torch.ones(_TOKENS, width), torch.ones(_ROWS, width), torch.ones(_TOKENS, _ROWS)
    a, b = {
        "logits": (hidden, weight.T),
        "hidden_gradient": (masses, weight),
        "weight_gradient": (masses.T, hidden),
    }[product]
    out = torch.zeros(len(a), b.shape[1])
    seconds: dict[Library, float] = {"torch.mm": math.inf, "oneDNN": math.inf}
    for _ in range(_ROUNDS):
        start = time.process_time()
        out.addmm_(a, b)
        middle = time.process_time()
        out.add_(onednn_matmul(a, b))
        end = time.process_time()
        seconds["torch.mm"] = min(seconds["torch.mm"], middle - start)
        seconds["oneDNN"] = min(seconds["oneDNN"], end - middle)
    return seconds
