"""The private name of PEFT that a mixture sets.

`tests/mixture/test_peft_patches.py` has its test, which fails when a new version of PEFT changes the name.
"""

from typing import Any


def set_active_adapters(layer: Any, names: list[str]) -> None:
    """Make `names` the active adapters of a layer of PEFT, none if empty.

    Its public `set_adapter` also makes them trainable and visits every weight: too slow to call twice a token.
    """
    layer._active_adapter = names
