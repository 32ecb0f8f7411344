"""The scheduling page's arithmetic and its plot."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from lab.plot import Panel, Series, draw
from lab.scheduling import LOADS, NUM_TRACES, OWN, POLICIES, SHOWN, interval, own_table

FIGURES = dict.fromkeys([*SHOWN, "preemptions"], 10.0)


def test_an_interval_by_hand() -> None:
    mean, half = interval([float(n % 2) for n in range(12)])
    assert mean == 0.5
    assert half == pytest.approx(2.201 * 0.5222 / 12**0.5, rel=1e-3)


def test_better_needs_an_interval_that_leaves_zero_out() -> None:
    better = {"priority": 9.0, "fair": 11.0, "slo": 11.0}
    found = {f"{load:g}": {p: [dict(FIGURES) for _ in range(NUM_TRACES)] for p in POLICIES} for load in LOADS}
    for policy, (figure, _) in OWN.items():
        for runs in found["1.2"][policy]:
            runs[figure] = better[policy]
        for runs in found["1"][policy]:
            runs[figure] = 20.0 - better[policy]
    rows = own_table(found).splitlines()[2:]
    for policy in OWN:
        verdicts = [row.split("|")[-2].strip() for row in rows if row.startswith(f"| {policy} ")]
        assert verdicts == ["no difference", "no difference", "no: worse", "yes"]


def test_a_plot_is_xml_with_a_line_and_its_intervals_for_every_series() -> None:
    series = [Series(name, [(60, 5.0, 1.0), (120, 50.0, 60.0)]) for name in ("a", "<b>")]
    svg = ET.fromstring(draw([Panel("one", series), Panel("two", series, log=True)], columns=2, x_label="load"))
    kinds = [element.tag.split("}")[1] for element in svg.iter()]
    assert (kinds.count("polyline"), kinds.count("circle")) == (4, 8)
    assert all(0 <= float(c.get("cy", "")) <= 210 for c in svg.iter() if c.tag.endswith("circle"))
