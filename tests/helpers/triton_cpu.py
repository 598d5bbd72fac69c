"""A stand-in for Triton's CPU backend, so that vLLM's CPU build runs its second model runner.

vLLM's CPU worker takes that runner where Triton has a backend named `cpu`, which the package `triton` does not bring.
With `TRITON_INTERPRET=1` Triton interprets kernels in Python, and asks the backend only for its target, device and
stream. Call `install` before vLLM is imported.
"""

import os

from tests.helpers.paths import ROOT

# the folder of `sitecustomize.py`, which calls `install` in each process that a test starts
PYTHONPATH = [str(ROOT / "tests/helpers/second_runner"), str(ROOT)]


def install() -> None:
    """Make the backend Triton's only one, here and in child processes."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([*PYTHONPATH, *(path for path in paths if path not in PYTHONPATH)])
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import Backend, backends
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class CpuCompiler:
        @staticmethod
        def supports_target(target):
            return target.backend == "cpu"

        def __init__(self, target):
            pass

        def hash(self):
            return "interpreter"

    class CpuDriver(DriverBase):
        @classmethod
        def is_active(cls):
            return True

        def map_python_to_cpp_type(self, ty):
            raise NotImplementedError("interpreted kernels are not compiled")

        def get_current_target(self):
            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self):
            import torch

            return torch.device("cpu")

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_benchmarker(self):
            raise NotImplementedError("interpreted kernels are not tuned")

    backends.clear()  # each of the others asks for a GPU
    backends["cpu"] = Backend(compiler=CpuCompiler, driver=CpuDriver)
    _take_masks_of_integers()
    _define_log1p()


def _take_masks_of_integers() -> None:
    """The interpreter takes masks of booleans only, compiled kernels also of integers, as in vLLM's ngram kernel."""
    from triton.runtime.interpreter import InterpreterBuilder

    def boolean(mask):
        mask.data = mask.data.astype(bool)
        return mask

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    InterpreterBuilder.create_masked_load = lambda self, ptrs, mask, *rest: load(self, ptrs, boolean(mask), *rest)
    InterpreterBuilder.create_masked_store = lambda self, ptrs, value, mask, *rest: store(
        self, ptrs, value, boolean(mask), *rest
    )


def _define_log1p() -> None:
    """The interpreter does not run the GPU's library, whose log1p vLLM's rejection sampler calls."""
    import triton.language as tl
    from triton.language.extra import libdevice

    libdevice.log1p = lambda x: tl.log(x + 1.0)
