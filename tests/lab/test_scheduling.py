"""The scheduling page's arithmetic and its plot."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from lab.plot import Panel, Series, draw
from lab.scheduling import LOADS, MORE_IS_BETTER, NUM_TRACES, OWN, POLICIES, SHOWN, interval, loss_table, own_table

FIGURES = dict.fromkeys([*SHOWN, "preemptions"], 10.0)


def test_an_interval_by_hand() -> None:
    mean, half = interval([float(n % 2) for n in range(NUM_TRACES)])
    assert mean == 0.5
    assert half == pytest.approx(2.040 * 0.508 / 32**0.5, rel=1e-3)


def runs_of(own: dict[str, dict[str, float]]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """All figures are 10, but for the policies' own at some loads: load -> figure -> value."""
    found = {f"{load:g}": {p: [dict(FIGURES) for _ in range(NUM_TRACES)] for p in POLICIES} for load in LOADS}
    for load, values in own.items():
        for policy, figures in OWN.items():
            for run in found[load][policy]:
                run.update({figure: values[figure] for figure in figures})
    return found


BETTER = {figure: 11.0 if figure in MORE_IS_BETTER else 9.0 for figures in OWN.values() for figure in figures}
WORSE = {figure: 20.0 - value for figure, value in BETTER.items()}


def test_better_needs_an_interval_that_leaves_zero_out() -> None:
    rows = own_table(runs_of({"1.2": BETTER, "1": WORSE})).splitlines()[2:]
    for policy, figures in OWN.items():
        verdicts = [row.split("|")[-2].strip() for row in rows if row.startswith(f"| {policy} ")]
        assert verdicts == ["no difference", "no difference", "worse", "better"] * len(figures)


def test_what_is_noticeably_worse_is_a_loss() -> None:
    rows = loss_table(runs_of({"1.2": BETTER, "1": WORSE, "0.6": {f: 10.0 + (v - 10) / 20 for f, v in WORSE.items()}}))
    lost = [[cell.strip() for cell in row.split("|")[1:4]] for row in rows.splitlines()[2:]]
    assert sorted(lost) == sorted([policy, figure, "100 %"] for policy, figures in OWN.items() for figure in figures)


def test_a_plot_is_xml_with_a_line_and_its_intervals_for_every_series() -> None:
    series = [Series(name, [(60, 5.0, 1.0), (120, 50.0, 60.0)]) for name in ("a", "<b>")]
    svg = ET.fromstring(draw([Panel("one", series), Panel("two", series, log=True)], columns=2, x_label="load"))
    kinds = [element.tag.split("}")[1] for element in svg.iter()]
    assert (kinds.count("polyline"), kinds.count("circle")) == (4, 8)
    assert all(0 <= float(c.get("cy", "")) <= 210 for c in svg.iter() if c.tag.endswith("circle"))
