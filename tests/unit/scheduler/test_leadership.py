"""Who leads, with time as an argument: one scheduler's view of its lease."""

from __future__ import annotations

import pytest

from services.scheduler import leadership as lead
from services.scheduler.leadership import Leadership, LeaseRules

RULES = LeaseRules(ttl_s=1.5, renew_s=0.4, margin_s=0.3, away_s=1.0, settle_s=2.0, announce_s=5.0)


class Told:
    """A machine and everything that it wanted."""

    def __init__(self) -> None:
        self.machine = Leadership(RULES)
        self.now = 100.0

    def at(self, now: float, event: lead.Event | None = None) -> list[lead.Action]:
        """Let it be `now`, and an event happen; what is wanted because of it."""
        self.now = now
        out = self.machine.handle(event, now)
        self.machine.check()
        deadline = self.machine.deadline()
        assert deadline is None or deadline > now, "it would spin"
        return out

    def leading(self, now: float = 100.0, term: int = 1) -> Told:
        """It has won at `now`."""
        assert self.at(now) == [lead.Acquire(term - 1, now)] or term > 1
        assert self.at(now, lead.Won(term, now)) == [lead.Lead(term), lead.Announce(term)]
        return self

    def renewing(self, until: float) -> list[lead.Action]:
        """Let time pass while the registry answers at once; what was wanted besides renewals."""
        wanted: list[lead.Action] = []
        while True:
            due = self.machine.deadline()
            if due is None or due > until:
                return wanted
            for action in self.at(due):
                if isinstance(action, lead.Renew):
                    wanted += self.at(due, lead.Kept(action.term, due))
                else:
                    wanted.append(action)

    def commands(self, now: float) -> bool:
        """Whether it may command at `now`."""
        return self.machine.may_command(now)


def test_whoever_wins_leads_at_once_and_renews() -> None:
    one = Told().leading()
    assert one.at(100.4) == [lead.Renew(1, 100.4)]
    assert one.at(100.41, lead.Kept(1, 100.4)) == []
    assert one.commands(101.5)


def test_commands_end_before_the_lease_counted_from_the_question_not_from_the_answer() -> None:
    one = Told()
    one.at(100.0)
    one.at(100.9, lead.Won(1, 100.0))  # the answer took 0.9 s
    assert one.commands(101.19)
    assert not one.commands(101.2)  # 100 + 1.5 − 0.3


def test_an_answer_that_comes_too_late_does_not_let_it_lead() -> None:
    one = Told()
    one.at(100.0)
    assert lead.Lead(1) not in one.at(101.3, lead.Won(1, 100.0))
    assert not one.commands(101.3)


def test_a_leader_that_cannot_renew_pauses_and_goes_on_with_its_picture() -> None:
    one = Told().leading()
    assert one.at(100.4) == [lead.Renew(1, 100.4)]
    assert one.at(101.0, lead.Unanswered()) == []
    assert one.commands(101.19)
    assert one.at(101.2) == [lead.Pause(), lead.Renew(1, 101.2)]
    assert not one.commands(101.25)
    assert one.at(101.3, lead.Kept(1, 101.2)) == []  # silent for more than a second: records may have expired
    assert one.renewing(103.25) == []
    assert not one.commands(103.25)
    assert one.renewing(103.35) == [lead.Resume(1), lead.Announce(1)]
    assert one.commands(103.35)


def test_a_registry_that_lost_the_lease_gives_it_again_under_the_next_term() -> None:
    one = Told().leading(term=5)
    one.at(100.4)
    assert one.at(100.41, lead.Lost(5)) == [lead.Pause(), lead.Acquire(5, 100.41)]
    assert one.at(100.42, lead.Won(6, 100.41)) == []  # what it lost is written again first
    assert not one.commands(100.42)
    assert one.renewing(102.4) == []
    assert one.renewing(102.5) == [lead.Resume(6), lead.Announce(6)]


def test_a_lease_that_ran_out_is_no_sign_that_the_registry_lost_anything() -> None:
    one = Told().leading(term=5)
    one.at(100.4)
    assert one.at(101.2) == [lead.Pause()]
    assert one.at(101.9, lead.Lost(5)) == [lead.Acquire(5, 101.9)]  # the renewal came too late
    assert one.at(101.91, lead.Won(6, 101.9)) == [lead.Resume(6), lead.Announce(6)]


def test_a_registry_that_forgot_the_terms_as_well_goes_on_far_above_and_nobody_led_meanwhile() -> None:
    one = Told().leading(term=5)
    one.at(100.4)
    one.at(100.41, lead.Lost(5))
    one.at(100.42, lead.Won(6 + lead.FORGOTTEN, 100.41))
    assert one.renewing(102.5) == [lead.Resume(6 + lead.FORGOTTEN), lead.Announce(6 + lead.FORGOTTEN)]


def test_its_picture_goes_if_another_one_led_meanwhile() -> None:
    one = Told().leading(term=5)
    one.at(100.4)
    one.at(100.41, lead.Lost(5))
    assert one.at(100.42, lead.Won(7, 100.41)) == [lead.StepDown()]
    assert not one.commands(100.42)


def test_a_leader_whose_lease_another_one_has_steps_down() -> None:
    one = Told().leading()
    one.at(100.4)
    one.at(100.41, lead.Lost(1))
    assert one.at(100.42, lead.Taken(2, 1.4)) == [lead.StepDown(), lead.StandBy()]
    assert not one.commands(100.43)


@pytest.mark.parametrize(
    ("heard", "steps_down"), [(lead.Heard(4), True), (lead.Heard(3), False), (lead.Heard(2), False)]
)
def test_a_leader_steps_down_when_it_hears_of_a_later_term(heard: lead.Heard, steps_down: bool) -> None:
    one = Told().leading(term=3)
    assert (lead.StepDown() in one.at(100.1, heard)) is steps_down
    assert one.commands(100.1) is not steps_down


def test_it_goes_beyond_the_highest_term_that_anybody_has_heard_of() -> None:
    one = Told().leading(term=1)  # the registry came back empty, and the terms with it
    assert one.at(100.1, lead.Heard(41)) == [lead.StepDown(), lead.Acquire(41, 100.1)]
    assert one.at(100.11, lead.Won(42, 100.1)) == [lead.Lead(42), lead.Announce(42)]


def test_two_leaders_of_one_term_both_step_down() -> None:
    one = Told().leading(term=3)
    assert lead.StepDown() in one.at(100.1, lead.Heard(3, rival=True))


def test_what_was_won_under_a_term_that_is_over_already_is_not_used() -> None:
    one = Told()
    one.at(100.0)
    one.at(100.05, lead.Heard(9))
    assert one.at(100.1, lead.Won(1, 100.0)) == [lead.Acquire(9, 100.1)]
    assert one.at(100.11, lead.Won(10, 100.1)) == [lead.Lead(10), lead.Announce(10)]


def test_a_standby_looks_when_the_lease_ends_and_when_a_scheduler_goes() -> None:
    one = Told()
    one.at(100.0)
    assert one.at(100.01, lead.Taken(7, 1.4)) == [lead.StandBy()]
    assert one.machine.deadline() == pytest.approx(100.41)
    assert one.at(100.2, lead.Hinted()) == [lead.Acquire(7, 100.2)]
    one.at(100.21, lead.Taken(7, 0.1))
    assert one.machine.deadline() == pytest.approx(100.31)
    assert one.at(100.31) == [lead.Acquire(7, 100.31)]
    assert one.at(100.32, lead.Won(8, 100.31)) == [lead.Lead(8), lead.Announce(8)]


def test_a_standby_that_wins_after_a_long_silence_of_the_registry_waits_for_the_records() -> None:
    one = Told()
    one.at(100.0)
    one.at(100.01, lead.Taken(1, 0.4))
    one.at(100.41)
    one.at(101.2, lead.Unanswered())
    one.at(101.4)
    assert one.at(101.5, lead.Won(2, 101.4)) == []
    assert one.renewing(103.45) == []
    assert one.renewing(103.55) == [lead.Lead(2), lead.Announce(2)]


def test_an_orderly_stop_gives_the_lease_back() -> None:
    one = Told().leading()
    assert one.at(100.1, lead.StopAsked()) == [lead.StepDown(), lead.Release(1)]
    assert not one.commands(100.1)
    assert one.at(100.11, lead.Released()) == [lead.Ended()]
    assert one.at(200.0) == []


def test_a_stop_waits_for_what_was_asked_and_gives_that_back_too() -> None:
    one = Told()
    one.at(100.0)
    assert one.at(100.1, lead.StopAsked()) == []
    assert one.at(100.2, lead.Won(1, 100.0)) == [lead.Release(1)]
    assert one.at(100.9, lead.Unanswered()) == [lead.Ended()]  # it expires by itself


def test_a_standby_stops_at_once() -> None:
    one = Told()
    one.at(100.0)
    one.at(100.01, lead.Taken(1, 1.0))
    assert one.at(100.1, lead.StopAsked()) == [lead.Ended()]


def test_who_leads_is_announced_again_and_again() -> None:
    one = Told().leading()
    assert one.renewing(112.0) == [lead.Announce(1), lead.Announce(1)]
