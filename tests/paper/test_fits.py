"""`logitmix recipes --fits`: what fits a device, in the sizes of a dry run."""

import shlex
from dataclasses import replace

import pytest

from logitmix.cli.__main__ import main
from logitmix.paper import fits
from logitmix.paper.fits import SETTINGS, Fit, find_devices, find_fit, setup_of
from logitmix.training.budget import memory, peak
from tests.helpers.commands import error_of

GIB = 2**30


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("available", [24 * GIB, 80 * GIB])
def test_the_batches_are_the_largest_that_fit(name, available):
    setup = setup_of("math/1.5b", name)
    fit = find_fit(setup, available)
    if not fit.rows:
        assert fit.needed == peak(memory(setup)) > available
        return
    assert peak(memory(replace(setup, rows=fit.rows, sampled=fit.sampled))) <= available
    assert fit.rows == 32 or peak(memory(replace(setup, rows=2 * fit.rows))) > available
    assert peak(memory(replace(setup, sampled=2 * fit.sampled))) > available


def test_each_setting_needs_less_than_the_one_before():
    needed = [find_fit(setup_of("math/1.5b", name), 0).needed for name in SETTINGS]
    assert needed == sorted(needed, reverse=True)
    assert find_devices(setup_of("math/1.5b", "full"), 24 * GIB) == 2
    assert find_devices(setup_of("math/1.5b", "full"), GIB) is None


def test_the_command_runs_with_as_many_rollouts_as_the_recipe(capsys):
    setup = setup_of("math/1.5b", "full")
    command = fits.command("math/1.5b", "full", find_fit(setup, 80 * GIB))
    assert main([*shlex.split(command)[1:], "--dry_run", "--device_memory", "80GiB", "--train_limit", "2048"]) == 0
    assert "of 256 rollouts each" in " ".join(capsys.readouterr().out.split())
    assert "--model_name_or_path Qwen/Qwen2.5-72B-Instruct" in fits.command(fits.LARGE, "LoRA pair", Fit(4, 8, 0))


def test_the_table_names_the_way_out_where_nothing_fits(capsys, monkeypatch):
    monkeypatch.setattr(fits, "CELLS", ("math/1.5b", "mmlu/1.5b"))
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["recipes", "--fits", "24GiB"]) == 0
    printed = capsys.readouterr().out
    assert "needs 29 GiB" in printed
    assert (
        "math/1.5b   logitmix train --recipe math/1.5b/fixed_mixing --offload_anchor true --optim adamw_bnb_8bit"
        in printed
    )
    monkeypatch.setattr(fits, "CELLS", (fits.LARGE,))
    assert main(["recipes", "--fits=40GiB"]) == 0
    assert "sharded over" in capsys.readouterr().out
    assert "--fits is 'large'; write it as 80GiB" in error_of(capsys, ["recipes", "--fits", "large"])
    assert "--fits takes the memory of one device" in error_of(capsys, ["recipes", "--fits"])
