"""Planning of the Triton backend: numbers in, numbers out."""

import dataclasses

import pytest
import torch

from fusedrnn.backends import triton
from fusedrnn.cells import CELLS

LSTM = CELLS["lstm"]
H100 = triton.Chip("sm_90", 132, 232448, 8, True)
RTX4090 = triton.Chip("sm_89", 128, 101376, 8)


def plan(batch, hidden, dtype=torch.bfloat16, proj=0, inputs=None, **options):
    return triton.plan(LSTM, batch, inputs or hidden, hidden, proj, dtype, **options)


@pytest.mark.parametrize(
    "hidden, dtype, tf32, algorithm",
    [
        (128, torch.bfloat16, False, "sequence"),
        (129, torch.bfloat16, False, "step"),
        (1, torch.float16, False, "sequence"),
        (64, torch.float32, False, "sequence"),
        (65, torch.float32, True, "step"),
        (32, torch.float64, False, "sequence"),
        (33, torch.float64, False, "step"),
    ],
)
def test_auto(hidden, dtype, tf32, algorithm):
    for backward in (False, True):
        assert plan(16, hidden, dtype, tf32=tf32, backward=backward).algorithm == algorithm


def test_why_is_told():
    assert plan(16, 768).why == "W_hh fits one program up to hidden_size=128 in half math, got 768"
    assert plan(16, 64, algorithm="step").why == "algorithm 'step' was asked for"
    assert "projection (proj_size=8)" in plan(16, 64, proj=8).why
    assert "RTX" not in plan(16, 128).why
    assert "sm_89 has 101376" in plan(16, 128, chip=RTX4090).why


@pytest.mark.parametrize("options", [{"hidden": 768}, {"hidden": 64, "proj": 8}])
def test_sequence_that_does_not_fit(options):
    with pytest.raises(ValueError, match="'sequence' of backend 'triton' cannot run: "):
        plan(16, algorithm="sequence", **options)


def test_persistent_is_not_here():
    with pytest.raises(ValueError, match="got 'persistent'"):
        plan(16, 64, algorithm="persistent")


def test_a_step_gives_every_multiprocessor_work():
    forward, backward = plan(16, 768), plan(16, 768, backward=True)
    assert forward.grid == (96, 1)
    assert backward.grid == (48, 1)
    assert plan(17, 768).grid == (96, 1)
    assert plan(1, 768).BB == 8


def test_wide_batches_fill_programs_of_sequence_twice():
    assert plan(16, 64).BB == 8
    assert plan(8 * 108 + 1, 64).BB == 16


@pytest.mark.parametrize(
    "chip", [triton.SM80, H100, RTX4090, triton.Chip("gfx942", 304, 65536, 16)], ids=lambda c: c.name
)
def test_tiles_fit_the_chip(chip):
    for batch in (1, 7, 16, 64, 1000):
        for hidden in (1, 5, 64, 129, 1024):
            for dtype in (torch.bfloat16, torch.float32, torch.float64):
                for backward in (False, True):
                    p = plan(batch, hidden, dtype, chip=chip, backward=backward)
                    assert p.shared_bytes <= chip.shared_bytes
                    assert chip.min_columns <= p.BB
                    assert p.grid[0] * p.BU >= hidden
                    assert p.grid[1] * p.BB >= batch


def test_one_step_of_many_rows_is_two_products_and_a_launch():
    assert plan(512, 64, steps=1).products
    assert plan(512, 64, steps=1, algorithm="step").products
    assert "two products by torch" in plan(512, 64, steps=1).why
    for other in ({"steps": 2}, {"algorithm": "sequence"}, {"backward": True}, {"steps": None}):
        assert not plan(512, 64, **{"steps": 1, **other}).products
    assert not plan(511, 64, steps=1).products


def test_a_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan(1, 1).BB = 2


def test_warps_of_a_step_may_be_asked_for(monkeypatch):
    def planned(algorithm):
        cpu = torch.device("cpu")
        return triton.plan_for(LSTM, 16, 96, 96, 0, torch.bfloat16, cpu, algorithm, backward=False).num_warps

    own = planned("step"), planned("sequence")
    assert own == (1, 8)
    for warps in ("1", "2", "4"):
        monkeypatch.setenv(triton.WARPS_VARIABLE, warps)
        assert (planned("step"), planned("sequence")) == (int(warps), 8)
    monkeypatch.setenv(triton.WARPS_VARIABLE, "3")
    with pytest.raises(ValueError, match="FUSEDRNN_TRITON_WARPS must be 1, 2 or 4, got '3'"):
        planned("step")
