"""The results as a page, with the deviations first."""

from collections.abc import Iterable

from calibrating.rows import ENUMERATED, LEAST, MOST, SIMULATED, Row

HEAD = f"""# Calibration

An interval that says 95% should hold the truth in 95 of 100 studies, and a test at 5% should reject what is true in 5 of 100 at most. This page measures both for every procedure of `imaginelens.estimates`, on data like those of the field: few examples, rare changes, examples in groups, recipients crossed with donors, skewed effects. `python benchmarks/calibration.py` computes it anew and writes it; all numbers, with their Monte-Carlo intervals, are in `benchmarks/results/calibration.json`.

**How.** 0/1 outcomes of independent examples are enumerated: every possible outcome, with its probability, so that these numbers have no noise ("exact" in the last column). The rest is simulated, on as many data sets as the last column says; for some of them the script compares its vectorised computation with `Estimate` itself, and stops where they differ. With 20,000 data sets a coverage of 95% is known to 0.4 points (99% Monte-Carlo interval), with 100,000 to 0.2.

**What.** *Coverage*: how often the 95% interval holds the truth. *Test*: how often `pvalue()` is below 0.05 although the null is true. *TOST*: how often `equivalence` is claimed although the effect is as large as the margin; for numbers (t and the like) the worse of the two ends of a wide margin. *Any cell*: how often a map has any false finding. *All cells*: how often the simultaneous intervals hold the truth in all cells.

**The rule.** Coverage is at least {LEAST:.0%}. False claims are at most {ENUMERATED:.0%} where enumerated; where simulated, the upper end of their 99% Monte-Carlo interval is at most {SIMULATED:.1%}. A coverage of more than {MOST:.0%} of an interval for numbers is flagged: such an interval is longer than it need be. (Coverage of 0/1 outcomes comes in jumps and is not flagged.)
"""  # noqa: E501

# Why rows of a procedure deviate: the first entry whose words are all in the row's key.
REASONS = (
    (("max-T", "not symmetric"), "Sign flips rest on effects that are symmetric about 0 where there is no effect. The skewed ones here are not, and the level does not hold: bring such an outcome to a scale on which it is (logits, ranks) before a map of it is tested."),  # noqa: E501
    (("lognormal",), "Skewed values: the mean of few examples seldom contains the rare large values that make up much of the true mean. The studentised bootstrap does better than t and does not repair it; prefer an outcome on a scale without such a tail, and hundreds of examples."),  # noqa: E501
    (("studentised bootstrap", "t, 3 df"), "Heavy tails: the bootstrap covers less than t, which is the default and keeps the rule here."),  # noqa: E501
    (("studentised bootstrap", "normal"), "At 5%, or too near to it for 20,000 data sets to tell."),
    (("group bootstrap",), "Resampling groups understates how much they vary, by little where groups are equal and by more where they are not."),  # noqa: E501
    (("cluster-robust t", "1, 2, 4 or 9"), "Groups of very unequal size: a few large ones carry most of the variance, so that its degrees of freedom are fewer than groups less one. Groups of one size keep the rule."),  # noqa: E501
    (("two-way crossed t", "ICC 0 and 0"), "Recipients and donors that make no difference: the variance is taken as at least that of either side, which guards the case in which they do."),  # noqa: E501
    (("mid-P",), "Mid-P is not exact, as its description says; McNemar's exact test is."),
    (("Tango score", "worst"), "The largest rate over all discordances from 0.1% to 100%. 5% is passed by a twentieth of a point, and only where 96 to 98% of the examples change."),  # noqa: E501
    (("Wilson",), "Hits are whole numbers, so that the level jumps from one share to the next; Wilson's test is right on average over shares, not for each."),  # noqa: E501
)  # fmt: skip


def page(rows: list[Row]) -> str:
    """The whole page, as markdown."""
    broken = [row for row in rows if row.breaks]
    parts = [HEAD, "## Deviations\n", _deviations(broken, len(rows)), "## All rows\n"]
    for procedure in dict.fromkeys(row.procedure for row in rows):
        parts += [f"### {procedure}\n", _table([r for r in rows if r.procedure == procedure])]
    return "\n".join(parts)


def reason(row: Row) -> str:
    """Why a row deviates, as far as is known."""
    return next((why for words, why in REASONS if all(w in row.key for w in words)), "")


def _deviations(broken: list[Row], count: int) -> str:
    lines = [f"{len(broken)} of {count} rates break the rule or are flagged.", ""]
    for why in dict.fromkeys(map(reason, broken)):
        rows = [row for row in broken if reason(row) == why]
        lines += [why or "Not explained yet.", ""]
        lines += _lines(
            ("procedure", "data", "rate of", "%", ""),
            ([r.procedure, r.data, r.quantity, percent(r), r.breaks] for r in rows),
        )
        lines.append("")
    return "\n".join(lines)


def _table(rows: list[Row]) -> str:
    quantities = list(dict.fromkeys(row.quantity for row in rows))
    cells = []
    for data in dict.fromkeys(row.data for row in rows):
        of_data = {row.quantity: row for row in rows if row.data == data}
        found = [percent(of_data[q]) if q in of_data else "" for q in quantities]
        runs = next(iter(of_data.values())).runs
        cells.append([data, *found, f"{runs:,}" if runs else "exact"])
    return "\n".join(_lines(("data", *(f"{q}, %" for q in quantities), "data sets"), cells)) + "\n"


def percent(row: Row) -> str:
    """The rate, in bold where it breaks the rule."""
    digits = 1 if row.quantity in ("coverage", "all cells") else 2
    text = f"{100 * row.rate:.{digits}f}"
    return f"**{text}**" if row.breaks else text


def _lines(head: tuple[str, ...], cells: Iterable[list[str]]) -> list[str]:
    rule = ["-" if name in ("procedure", "data", "rate of", "") else "-:" for name in head]
    rows = (f"| {' | '.join(row)} |" for row in cells)
    return [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|", *rows]
