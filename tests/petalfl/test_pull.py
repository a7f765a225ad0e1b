"""`Pull` against a server that loses, repeats, lies and stops; the real one is elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from petalfl import wire
from petalfl.errors import EnrollError, TransportError
from petalfl.pull import FIRST_WINDOW_BYTES, MIN_WINDOW_BYTES, MOST_LOST, Pull
from petalfl.source import BrokenOffError, NotThereError
from petalfl.wire import CHUNK_BYTES, MAX_FETCH_BYTES, Declined, Fetch, Part

PATH = "blocks/head/3"
BODY = np.random.default_rng(0).bytes(3_000_001)
SHA = hashlib.sha256(BODY).hexdigest()
Answer = Callable[[Fetch], list[Part | Declined]]


def parts(fetch: Fetch, body: bytes = BODY) -> list[Part | Declined]:
    """What an honest server sends."""
    sha256, end = hashlib.sha256(body).hexdigest(), min(fetch.offset + fetch.num_bytes, len(body))
    if fetch.known == sha256:
        return [Declined(fetch.path, "unchanged")]
    ticket = fetch.offset.to_bytes(8, "big")
    return [
        Part(fetch.path, sha256, len(body), at, ticket, body[at : min(at + CHUNK_BYTES, end)])
        for at in range(fetch.offset, max(end, fetch.offset + 1), CHUNK_BYTES)
    ]


class Line:
    """A `Pull` and what answers it, at once; `answers` go before the honest ones."""

    def __init__(self, *answers: Answer, answer: Answer = parts) -> None:
        self.fetches: list[Fetch] = []
        self.answers, self.answer = list(answers), answer
        self.pull = Pull()
        self.pull.attach(self.send)

    def send(self, fetch: Fetch) -> None:
        self.fetches.append(fetch)
        answer = self.answers.pop(0) if self.answers else self.answer
        for message in answer(fetch):
            decoded = wire.decode(wire.encode(message))
            assert isinstance(decoded, (Part, Declined))
            self.pull.receive(decoded)

    def stream(self, start: int = 0) -> bytes:
        data = bytearray(BODY[:start])
        for offset, piece in self.pull.stream(PATH, SHA, start, len(BODY)):
            assert offset == len(data)
            data += piece
        return bytes(data)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalfl.pull.TIMEOUT_S", 0.05)


def test_a_file_comes_in_windows_that_grow() -> None:
    line = Line()
    assert line.stream() == BODY
    sizes = [fetch.num_bytes for fetch in line.fetches]
    assert sizes[:3] == [FIRST_WINDOW_BYTES, 2 * FIRST_WINDOW_BYTES, 4 * FIRST_WINDOW_BYTES]
    assert max(sizes) == MAX_FETCH_BYTES
    assert sum(sizes[:-1]) < len(BODY) <= sum(sizes)


def test_every_window_shows_that_the_one_before_has_come() -> None:
    line = Line()
    line.stream()
    assert line.fetches[0].ticket == b""
    for before, after in zip(line.fetches[:-1], line.fetches[1:], strict=True):
        assert after.ticket == before.offset.to_bytes(8, "big")


@pytest.mark.parametrize("start", [1, CHUNK_BYTES, len(BODY) - 1])
def test_it_goes_on_from_anywhere(start: int) -> None:
    line = Line()
    assert line.stream(start) == BODY
    assert line.fetches[0].offset == start


def lose(*numbers: int) -> Answer:
    return lambda fetch: [p for i, p in enumerate(parts(fetch)) if i not in numbers]


def test_what_is_lost_is_asked_for_again() -> None:
    """From the first that is missing; what came behind it, again with it."""
    line = Line(parts, parts, lose(1), lose(0), lose(0, 1, 2, 3, 4, 5, 6, 7))
    assert line.stream() == BODY
    third = line.fetches[2]
    assert [fetch.offset for fetch in line.fetches[3:6]] == [third.offset + CHUNK_BYTES] * 3
    assert line.fetches[3].num_bytes == third.num_bytes // 2


def test_a_line_on_which_nothing_comes_is_given_up() -> None:
    line = Line(parts, answer=lambda fetch: [])
    with pytest.raises(BrokenOffError, match=f"nothing comes of {PATH} over MQTT any longer"):
        line.stream()
    assert len(line.fetches) == 1 + MOST_LOST
    line.answer = parts
    assert line.stream(FIRST_WINDOW_BYTES) == BODY


def test_what_came_while_the_device_slept_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def monotonic() -> float:
        nonlocal now_s
        now_s += 1  # whenever it is looked at, the time is over
        return now_s

    monkeypatch.setattr("petalfl.pull.time", SimpleNamespace(monotonic=monotonic))
    line = Line()
    assert line.stream() == BODY
    assert sum(fetch.num_bytes for fetch in line.fetches[:-1]) < len(BODY)


def test_after_a_break_it_asks_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalfl.pull.TIMEOUT_S", 3600.0)

    def mended(fetch: Fetch) -> list[Part | Declined]:
        line.pull.reconnected()
        return []

    line = Line(parts, mended, mended)
    line.pull.reconnected()  # while nothing is under way
    assert line.stream() == BODY
    assert [fetch.offset for fetch in line.fetches[1:4]] == [FIRST_WINDOW_BYTES] * 3


def test_a_window_never_gets_smaller_than_it_may() -> None:
    line = Line(answer=lambda fetch: [])
    for _ in range(6):
        with pytest.raises(BrokenOffError):
            line.stream()
    assert min(fetch.num_bytes for fetch in line.fetches) == MIN_WINDOW_BYTES


ODD: dict[str, Answer] = {
    "twice": lambda f: [one for part in parts(f) for one in (part, part)],
    "what came before": lambda f: [*parts(replace(f, offset=0)), *parts(f)],
    "of another file": lambda f: [*parts(replace(f, path="manifest")), *parts(f)],
    "longer than asked for": lambda f: parts(replace(f, num_bytes=MAX_FETCH_BYTES)),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_answers_that_do_no_harm(odd: str) -> None:
    line = Line(parts, parts, ODD[odd], ODD[odd])
    assert line.stream() == BODY


@pytest.mark.parametrize(
    ("hostile", "error"),
    [
        (lambda f: parts(f, BODY + b"x"), "is another file on the server: 3000002 bytes"),
        (lambda f: parts(f, BODY[:-1] + b"?"), "is another file on the server: 3000001 bytes"),
        (lambda f: parts(f, b""), "is another file on the server: 0 bytes"),
        (lambda f: [replace(p, num_bytes=7) for p in parts(f) if isinstance(p, Part)],
         "goes on behind its 7 bytes"),
        (lambda f: [replace(p, data=p.data[:1]) for p in parts(f) if isinstance(p, Part)],
         "nothing comes"),
        (lambda f: [replace(p, data=b"") for p in parts(f) if isinstance(p, Part)],
         "nothing comes"),
        (lambda f: [replace(p, offset=p.offset + 1) for p in parts(f) if isinstance(p, Part)],
         "nothing comes"),
    ],
    ids=["longer", "changed", "emptied", "behind the end", "trickle", "no bytes", "elsewhere"],
)  # fmt: skip
@pytest.mark.parametrize("is_first", [True, False])
def test_hostile_answers(hostile: Answer, error: str, is_first: bool) -> None:
    line = Line(*([] if is_first else [parts]), answer=hostile)
    with pytest.raises(TransportError, match=error):
        line.stream()


@pytest.mark.parametrize(
    ("why", "kind"),
    [("not-there", NotThereError), ("not-held", EnrollError), ("failed", TransportError)],
)
def test_files_that_are_declined(why: str, kind: type[Exception]) -> None:
    line = Line(answer=lambda f: [Declined(f.path, why, "because")])  # type: ignore[arg-type]
    with pytest.raises(kind, match=f"^{PATH}: because$"):
        line.stream()


def test_a_flood_is_not_kept() -> None:
    line = Line(lambda f: parts(f) * 10_000)
    assert line.stream() == BODY
    assert line.pull._arrived.qsize() <= 16


def test_a_flood_of_other_parts_is_no_reason_to_wait_on() -> None:
    pull = Pull(lambda: pull.receive(parts(Fetch(PATH, CHUNK_BYTES, CHUNK_BYTES))[0]))
    fetches: list[Fetch] = []
    pull.attach(fetches.append)
    with pytest.raises(BrokenOffError, match="nothing comes"):
        next(pull.stream(PATH, SHA, 0, len(BODY)))
    assert len(fetches) == MOST_LOST


def test_what_nobody_asked_for_is_not_kept() -> None:
    line = Line()
    for part in parts(Fetch(PATH, 0, MAX_FETCH_BYTES)):
        line.pull.receive(part)
    assert line.pull._arrived.empty()


def test_without_a_connection() -> None:
    with pytest.raises(TransportError, match="no connection to the broker yet"):
        next(Pull().stream(PATH, SHA, 0, len(BODY)))


def test_it_gives_way_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalfl.pull.TIMEOUT_S", 3600.0)
    monkeypatch.setattr("petalfl.pull.POLL_S", 0.01)
    num_checks = 0

    def check() -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 3:
            raise KeyboardInterrupt

    pull = Pull(check)
    pull.attach(lambda fetch: None)
    with pytest.raises(KeyboardInterrupt):
        next(pull.stream(PATH, SHA, 0, len(BODY)))


# A file of which nobody knows the digest


@pytest.mark.parametrize("body", [b"{}", b"", BODY], ids=["short", "empty", "long"])
def test_a_manifest(body: bytes) -> None:
    line = Line(answer=lambda f: parts(f, body))
    assert line.pull.get_changed("manifest", len(BODY), "ab" * 32) == body


def test_a_manifest_that_has_not_changed() -> None:
    line = Line()
    assert line.pull.get_changed("manifest", len(BODY), SHA) is None
    assert [fetch.known for fetch in line.fetches] == [SHA]


def test_a_manifest_that_is_too_long() -> None:
    line = Line()
    with pytest.raises(TransportError, match="manifest has 3000001 bytes, due are 100 at most"):
        line.pull.get_changed("manifest", 100, "ab" * 32)
    assert len(line.fetches) == 1


def test_a_manifest_that_changes_meanwhile() -> None:
    line = Line(parts, answer=lambda f: parts(f, BODY[:-1] + b"?"))
    with pytest.raises(TransportError, match="manifest has changed while it came"):
        line.pull.get_changed("manifest", len(BODY), "ab" * 32)


def test_a_manifest_that_is_not_what_its_digest_says() -> None:
    line = Line(answer=lambda f: [replace(p, sha256="0" * 64) for p in parts(f)
                                  if isinstance(p, Part)])  # fmt: skip
    with pytest.raises(TransportError, match="manifest comes with the wrong sha256"):
        line.pull.get_changed("manifest", len(BODY), "ab" * 32)
