"""Who asks one thing at a time is looked out for, unless it disappoints."""

import os

import pytest

from pynbd.server.patience import LONE_REQUESTS, MOST_LET_PASS, Patience


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def patient() -> Patience:
    patience = Patience()
    for _ in range(LONE_REQUESTS):
        assert not patience.worth_it()
        patience.received(1)
    return patience


def test_a_client_that_asks_one_thing_at_a_time() -> None:
    patience = patient()
    for _ in range(100):
        assert patience.worth_it()
        patience.came()
        patience.received(1)


@pytest.mark.parametrize("requests", [0, 2, 16])
def test_a_client_that_asks_more_is_served_in_batches(requests: int) -> None:
    patience = patient()
    patience.received(requests)
    assert not patience.worth_it()


def test_who_disappoints_is_looked_out_for_more_and_more_seldom() -> None:
    patience = patient()
    passed = []
    for _ in range(14):
        assert patience.worth_it()
        patience.did_not_come()
        let_pass = 0
        while not patience.worth_it():
            let_pass += 1
        passed.append(let_pass)
        assert let_pass <= MOST_LET_PASS
    assert passed[:4] == [2, 4, 8, 16]
    assert passed[-1] == MOST_LET_PASS
    patience.came()
    patience.did_not_come()
    assert [patience.worth_it() for _ in range(3)] == [False, False, True]


def test_on_one_processor_the_client_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    patience = Patience()
    for _ in range(2 * LONE_REQUESTS):
        patience.received(1)
        assert not patience.worth_it()
