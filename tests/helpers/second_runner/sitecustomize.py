"""Installs the stand-in in the processes that vLLM starts: Python imports this file first if it is on the path."""

from tests.helpers.triton_cpu import install

install()
