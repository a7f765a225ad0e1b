from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from petalfl.pacing import Pacing, Stopped


def waiting(pacing: Pacing) -> tuple[threading.Thread, list[str]]:
    """A thread that waits, and what came of it."""
    outcome: list[str] = []

    def wait() -> None:
        try:
            pacing.wait()
            outcome.append("goes on")
        except Stopped:
            outcome.append("stopped")

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread, outcome


def test_nothing_to_wait_for() -> None:
    Pacing().wait()


def test_stop_and_begin() -> None:
    pacing = Pacing()
    pacing.stop()
    with pytest.raises(Stopped):
        pacing.wait()
    pacing.begin()
    pacing.wait()


@pytest.mark.parametrize("end", ["resume", "stop"])
def test_a_pause_ends(end: str) -> None:
    pacing = Pacing()
    pacing.pause()
    thread, outcome = waiting(pacing)
    thread.join(0.1)
    assert thread.is_alive() and pacing.is_paused
    getattr(pacing, end)()
    thread.join(30)
    assert outcome == ["goes on" if end == "resume" else "stopped"]
    assert not pacing.is_paused


def test_it_asks_until_the_device_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalfl.pacing.POLL_S", 0.001)
    answers = iter([False, False, True])
    Pacing(lambda: next(answers)).wait()
    assert next(answers, None) is None


def test_stop_does_not_wait_for_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalfl.pacing.POLL_S", 3600)
    is_asked = threading.Event()

    def should_train() -> bool:
        is_asked.set()
        return False

    pacing = Pacing(should_train)
    thread, outcome = waiting(pacing)
    assert is_asked.wait(30)
    pacing.stop()
    thread.join(30)
    assert outcome == ["stopped"]


def test_rests_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pacing, clock_s = Pacing(), iter([10.0, 13.5])

    def monotonic() -> float:
        pacing.resume()  # looked at when a rest begins, and after it
        return next(clock_s)

    monkeypatch.setattr("petalfl.pacing.time", SimpleNamespace(monotonic=monotonic))
    pacing.wait()
    assert pacing.rested_s == 0
    pacing.pause()
    pacing.wait()
    assert pacing.rested_s == 3.5
