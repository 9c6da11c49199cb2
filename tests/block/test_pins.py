from pynbd.block.pins import Pins


def test_nobody_inside() -> None:
    pins = Pins()
    age = pins.end_age()
    assert pins.gone(age)


def test_who_was_inside_when_it_was_freed_holds_it() -> None:
    pins = Pins()
    with pins.hold():
        age = pins.end_age()
        with pins.hold():
            assert not pins.gone(age)
        assert not pins.gone(age)
    assert pins.gone(age)


def test_who_came_later_does_not_hold_it() -> None:
    pins = Pins()
    age = pins.end_age()
    with pins.hold():
        assert pins.gone(age)


def test_an_older_request_holds_all_that_was_freed_since() -> None:
    pins = Pins()
    with pins.hold():
        first = pins.end_age()
        with pins.hold():
            second = pins.end_age()
        assert not pins.gone(first)
        assert not pins.gone(second)
    assert pins.gone(second)
    assert pins.gone(first)
