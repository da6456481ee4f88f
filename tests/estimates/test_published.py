"""The published rows hold together: net changes fit the printed accuracies, margins the report."""

import numpy as np
import pytest

from imaginelens.estimates import EstimateError
from imaginelens.estimates.published import PublishedRow, published_rows


@pytest.mark.parametrize("row", published_rows(), ids=lambda r: f"{r.model} {r.intervention}")
def test_the_net_change_fits_what_is_printed(row: PublishedRow) -> None:
    """Some whole number of right answers is `before`, and with the net change `after`.

    Within 0.1 points: VSP's numbers are cut, and 159 of 191 (83.246%) are printed as 83.3.
    """
    right = np.arange(row.n + 1)
    before, after = 100 * right / row.n, 100 * (right + row.net) / row.n
    assert np.any((abs(before - row.before) < 0.1) & (abs(after - row.after) < 0.1))
    off = 100 * (right + row.net + 2) / row.n
    assert row.n > 1000 or not np.any(
        (abs(before - row.before) < 0.1) & (abs(off - row.after) < 0.1)
    )


def test_the_margins_are_those_of_the_report() -> None:
    rows = {(row.model, row.benchmark, row.intervention): row for row in published_rows()}
    assert len(rows) == len(published_rows()) == 11
    found = {
        key: [round(100 * margin, 1) for margin in row.margins().values() if margin is not None]
        for key, row in rows.items()
    }
    same, noise = "one tensor for all latents", "noise alone"
    assert found["Monet", "V*", same] == [3.0, 3.7, 4.5, 6.0]
    assert found["Monet", "HR-Bench-4K", same] == [1.9, 2.4, 2.9, 3.6]
    assert found["Monet", "MME-RealWorld-Lite", same] == [1.2, 1.5, 1.9, 2.4]
    assert found["Mirage stage 2", "VSP", same] == [1.7, 2.3, 3.0, 4.0]
    assert found["Mirage stage 2", "VSP", noise] == [2.2, 2.8, 3.5, 4.5]
    assert found["Mirage stage 2", "VSP", "near zero"] == []


def test_none_had_the_examples_for_three_points_unless_few_answers_changed() -> None:
    first, *rest = published_rows()
    needed = first.examples_needed()
    assert needed == {0.02: 281, 0.05: 520, 0.10: 974, 0.20: 1913}
    assert all(row.examples_needed() == needed for row in rest)
    assert first.n < min(needed.values())


def test_what_is_no_share_is_refused() -> None:
    row = published_rows()[0]
    with pytest.raises(EstimateError, match=r"discordance of 1\.5"):
        row.smallest_margin(1.5)
    with pytest.raises(EstimateError, match=r"discordance of -0\.1"):
        row.smallest_margin(-0.1)
    with pytest.raises(EstimateError, match="margin of 3"):
        row.examples_needed(margin=3.0)
