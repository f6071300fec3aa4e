"""When a child is started again, and when it is given up."""

from __future__ import annotations

from services.cli.supervision import QUICK_FAILURES, QUICK_S, GiveUp, StartAgain, Supervision, how


def test_quick_failures_wait_longer_and_longer_then_give_up() -> None:
    supervision = Supervision()
    verdicts = [supervision.ended(1, 0.5) for _ in range(QUICK_FAILURES)]
    waits = [verdict.after_s for verdict in verdicts if isinstance(verdict, StartAgain)]
    assert len(waits) == QUICK_FAILURES - 1
    assert waits == sorted(waits) and waits[0] < waits[-1]
    assert isinstance(verdicts[-1], GiveUp)
    assert "exit code 1" in verdicts[-1].reason
    assert supervision.restarts == QUICK_FAILURES - 1


def test_a_long_run_forgives_earlier_failures() -> None:
    supervision = Supervision()
    for _ in range(50):
        for _ in range(QUICK_FAILURES - 1):
            assert isinstance(supervision.ended(-9, 0.1), StartAgain)
        assert supervision.ended(-9, QUICK_S) == StartAgain(0.2)


def test_wrong_settings_are_not_tried_twice() -> None:
    assert isinstance(Supervision().ended(2, 0.1), GiveUp)


def test_an_end_without_error_is_an_end_all_the_same() -> None:
    supervision = Supervision()
    assert {supervision.ended(0, ran_s) for ran_s in (100.0, *[1.0] * 20)} == {StartAgain(0.2)}
    for _ in range(QUICK_FAILURES - 1):
        supervision.ended(1, 0.5)
    supervision.ended(0, 0.5)
    assert supervision.ended(1, 0.5) == StartAgain(0.2), "it could run"


def test_how_a_process_ended_in_words() -> None:
    assert how(-9) == "by signal 9"
    assert how(3) == "with exit code 3"
