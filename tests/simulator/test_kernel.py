"""Virtual time: order, cancelling, and the digest."""

from __future__ import annotations

from simulator.kernel import Kernel


def test_what_is_due_happens_in_order_and_at_its_time() -> None:
    kernel, seen = Kernel(), list[tuple[str, float]]()
    kernel.at(2.0, lambda: seen.append(("late", kernel.now)))
    kernel.after(1.0, lambda: seen.append(("early", kernel.now)))
    kernel.after(1.0, lambda: seen.append(("early too", kernel.now)))
    kernel.at(5.0, lambda: seen.append(("never", kernel.now)))
    kernel.run(3.0)
    assert seen == [("early", 1.0), ("early too", 1.0), ("late", 2.0)]
    assert kernel.now == 3.0


def test_what_happens_may_make_more_happen_at_once_and_later() -> None:
    kernel, seen = Kernel(), list[str]()

    def first() -> None:
        kernel.after(0.0, lambda: seen.append("at once"))
        kernel.at(0.0, lambda: seen.append("the past is now"))
        kernel.after(1.5, lambda: seen.append("later"))

    kernel.after(1.0, first)
    kernel.run(2.0)
    assert seen == ["at once", "the past is now"]
    kernel.run(3.0)
    assert seen[2:] == ["later"]


def test_what_is_cancelled_does_not_happen() -> None:
    kernel, seen = Kernel(), list[str]()
    timer = kernel.after(1.0, lambda: seen.append("cancelled"))
    kernel.after(0.5, timer.cancel)
    kernel.after(1.0, lambda: seen.append("other"))
    kernel.run(2.0)
    timer.cancel()
    assert seen == ["other"]


def test_the_digest_knows_what_when_and_who() -> None:
    def digest(second: float, who: str, what: str) -> str:
        kernel = Kernel()
        kernel.at(second, lambda: kernel.note(who, what))
        kernel.run(5.0)
        return kernel.digest

    assert digest(1.0, "a", "b") == digest(1.0, "a", "b")
    assert len({digest(1.0, "a", "b"), digest(2.0, "a", "b"), digest(1.0, "b", "b"), digest(1.0, "a", "c")}) == 4


def test_a_trace_hears_every_line_and_else_the_last_are_kept() -> None:
    lines: list[str] = []
    told, silent = Kernel(lines.append), Kernel()
    for kernel in (told, silent):
        kernel.note("w0", "begins")
    assert lines == ["0.000000 w0 begins"]
    assert list(silent.last_lines) == lines
