"""The judge of the soak: what a disk may hold while requests are in flight, and that it is not
asleep.

"Ordering of messages and writes" in the NBD specification: requests in flight have no order.
"""

from __future__ import annotations

import numpy as np
import pytest

from interop.soak.shadow import Bytes, Mismatch, Shadow, stamp, unstamp

SIZE = 64


def of(value: int, length: int) -> Bytes:
    return np.full(length, value, np.uint8)


@pytest.fixture
def shadow() -> Shadow:
    return Shadow(of(9, SIZE))


def reads(shadow: Shadow, offset: int, *got: int) -> None:
    """A read from ``offset`` gives these bytes; nothing begins or ends meanwhile."""
    shadow.judge(shadow.begin_read(offset, len(got)), np.array(got, np.uint8))


def refuses(shadow: Shadow, offset: int, *got: int) -> None:
    with pytest.raises(Mismatch):
        reads(shadow, offset, *got)


def test_stamps_tell_who_and_where() -> None:
    content = stamp(12345, 13, 40)
    assert len(content) == 40
    assert unstamp(content[3:11].tobytes()) == (12345, 16)
    assert np.array_equal(stamp(12345, 20, 10), content[7:17])
    assert unstamp(stamp(7, 1 << 30, 8).tobytes()) == (7, 1 << 30)


def test_a_completed_change_replaces_what_was_there(shadow: Shadow) -> None:
    reads(shadow, 0, 9, 9)
    shadow.completed(shadow.begin(1, 2, of(1, 2)))
    reads(shadow, 0, 9, 1, 1, 9)
    refuses(shadow, 0, 9, 1, 9)
    refuses(shadow, 0, 1)
    shadow.completed(shadow.begin(2, 10))
    reads(shadow, 1, 1, 0)


def test_in_flight_it_may_be_seen_or_not(shadow: Shadow) -> None:
    change = shadow.begin(1, 2, of(1, 2))
    reads(shadow, 0, 9, 1, 9)
    reads(shadow, 0, 9, 9, 1)
    refuses(shadow, 0, 1, 9, 9)
    shadow.completed(change)
    refuses(shadow, 0, 9, 9, 1)


def test_a_read_sees_what_was_there_when_it_began(shadow: Shadow) -> None:
    reading = shadow.begin_read(0, 3)
    shadow.completed(shadow.begin(0, 1, of(1, 1)))
    shadow.completed(shadow.begin(0, 1, of(2, 1)))
    shadow.judge(reading, np.array([9, 9, 9], np.uint8))
    reading = shadow.begin_read(0, 1)
    shadow.completed(shadow.begin(0, 1, of(3, 1)))
    with pytest.raises(Mismatch):  # it was replaced before the read began
        shadow.judge(reading, of(1, 1))


def test_any_of_two_in_flight_together_may_be_the_last(shadow: Shadow) -> None:
    one, two = shadow.begin(0, 4, of(1, 4)), shadow.begin(2, 4, of(2, 4))
    shadow.completed(two)
    shadow.completed(one)
    refuses(shadow, 0, 1, 2)
    refuses(shadow, 2, 9)
    reads(shadow, 1, 1, 1, 2, 2)
    refuses(shadow, 2, 2)  # it was read as 1, and nothing was in flight
    reads(shadow, 2, 1, 2)
    assert not shadow.unsettled


def test_what_was_replaced_while_another_was_in_flight(shadow: Shadow) -> None:
    """Two follows one: three, which was in flight with both, may come last, or two, but not one."""
    three = shadow.begin(0, 4, of(3, 4))
    shadow.completed(shadow.begin(0, 4, of(1, 4)))
    shadow.completed(shadow.begin(0, 2, of(2, 2)))
    shadow.completed(three)
    assert shadow.unsettled
    refuses(shadow, 0, 1)
    refuses(shadow, 2, 9)
    reads(shadow, 0, 2, 3, 1, 3)


def test_one_that_failed_has_happened_or_not(shadow: Shadow) -> None:
    shadow.failed(shadow.begin(0, 2, of(1, 2)))
    refuses(shadow, 0, 2)
    reads(shadow, 0, 1, 9)
    refuses(shadow, 0, 9, 1)  # settled


def test_an_optional_one_too(shadow: Shadow) -> None:
    shadow.completed(shadow.begin(0, 2, optional=True))
    refuses(shadow, 0, 1)
    reads(shadow, 0, 0, 9)


def test_one_that_was_refused_has_not_happened(shadow: Shadow) -> None:
    change = shadow.begin(0, 2)
    reading = shadow.begin_read(0, 1)
    shadow.refused(change)
    with pytest.raises(Mismatch):
        shadow.judge(reading, of(0, 1))
    reads(shadow, 0, 9, 9)


def test_what_was_abandoned_has_happened_or_not(shadow: Shadow) -> None:
    shadow.begin(0, 2, of(1, 2))
    shadow.begin_read(0, 8)
    left = of(9, SIZE)
    left[1] = 1
    shadow.abandoned(left)
    refuses(shadow, 0, 1)
    reads(shadow, 0, 9, 1)
    shadow.begin(4, 2)
    left[4:6] = 2
    with pytest.raises(Mismatch):
        shadow.abandoned(left)


def test_the_complaint_names_who_wrote(shadow: Shadow) -> None:
    shadow.completed(shadow.begin(0, 64, stamp(77, 0, 64)))
    foreign = np.concatenate([stamp(77, 0, 16), stamp(5, 800, 8), stamp(77, 24, 40)])
    with pytest.raises(Mismatch) as said:
        shadow.judge(shadow.begin_read(0, 64), foreign)
    assert "first lies at 16" in str(said.value)
    assert "of request 5 for offset 800" in str(said.value)
    assert "expected is" in str(said.value)
    assert "of request 77" in str(said.value)
