"""The committed calibration is what the code gives, and says where it breaks its own rule."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import calibration  # noqa: E402
from calibrating.counts import paired_rows, share_rows  # noqa: E402
from calibrating.page import page, reason  # noqa: E402
from calibrating.rows import Row  # noqa: E402

DONE = calibration.load(calibration.OUT)
ROWS = [row for rows in DONE.values() for row in rows]


@pytest.mark.parametrize(
    ("name", "compute"), [("paired, n = 20", paired_rows), ("share, n = 20", share_rows)]
)
def test_enumerated_rows_are_those_of_the_code(name: str, compute) -> None:
    committed, now = DONE[name], compute(20)
    assert [row.key for row in committed] == [row.key for row in now]
    assert [row.rate for row in committed] == pytest.approx([row.rate for row in now], abs=1e-12)
    assert len(now) > 10


def test_every_row_that_breaks_the_rule_is_listed() -> None:
    listed = calibration.deviations(calibration.OUT)
    assert listed == [row.key for row in ROWS if row.breaks]
    assert len({row.key for row in ROWS}) == len(ROWS)
    text = calibration.PAGE.read_text()
    assert text == page(ROWS)
    assert all(reason(row) for row in ROWS if row.breaks), "a deviation without its reason"


def test_the_grid_is_there() -> None:
    keys = " ".join(row.key for row in ROWS)
    for words in (
        *(f"{d}, n = {n}" for d in ("normal", "t, 3 df", "lognormal") for n in (20, 50, 191)),
        *(f"n = {n}, {d}% discordant" for n in (20, 50, 191) for d in (2, 5, 10)),
        *(f"{n} groups of {s}" for n in (10, 20, 50) for s in ("4 each", "1, 2, 4 or 9")),
        *("10 x 10", "20 x 20", "50 x 20", "Fieller", "max-T", "sign flips", "relative margin"),
    ):
        assert words in keys
    assert all(row.runs == 0 or row.runs >= 20_000 for row in ROWS)


@pytest.mark.parametrize(
    ("quantity", "rate", "half", "runs", "binary", "breaks"),
    [
        ("coverage", 0.929, 0.0, 0, True, "covers too little"),
        ("coverage", 0.931, 0.0, 0, True, ""),
        ("coverage", 0.975, 0.002, 20_000, False, "wider than needed"),
        ("coverage", 0.999, 0.0, 0, True, ""),
        ("all cells", 0.90, 0.002, 20_000, True, "covers too little"),
        ("test", 0.0501, 0.0, 0, True, "rejects too often"),
        ("TOST", 0.05, 0.0, 0, True, ""),
        ("TOST", 0.053, 0.0025, 60_000, False, "rejects too often"),
        ("TOST", 0.053, 0.0015, 100_000, False, ""),
        ("test", 0.052, 0.004, 20_000, False, "may reject too often: too few runs to tell"),
        ("any cell", 0.07, 0.003, 20_000, False, "rejects too often"),
    ],
)
def test_the_rule(
    quantity: str, rate: float, half: float, runs: int, binary: bool, breaks: str
) -> None:
    row = Row("p", "d", quantity, rate, rate - half, rate + half, runs, binary)
    assert row.breaks == breaks
