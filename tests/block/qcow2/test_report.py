"""What a report keeps of its findings."""

from __future__ import annotations

from collections.abc import Iterator

from pynbd.block.qcow2.report import MAX_FINDINGS, Report


def test_clean() -> None:
    assert Report().clean
    assert Report(leaks_fixed=1, corruptions_fixed=2, total_clusters=3).clean
    for report in Report(leaks=1), Report(corruptions=1), Report(check_errors=1):
        assert not report.clean


def test_findings_beyond_the_limit_are_not_even_made() -> None:
    made = 0

    def lines() -> Iterator[str]:
        nonlocal made
        while True:
            made += 1
            yield "finding"

    report = Report()
    report.corrupt(10**6, lines())
    report.corrupt(5, lines())
    assert report.corruptions == 10**6 + 5
    assert made == len(report.findings) == MAX_FINDINGS
