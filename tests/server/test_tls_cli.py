"""What `python -m server` refuses of certificates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from server import __main__ as cli
from tests.certificates import Authority, Issued
from tests.server.builders import write_artifacts


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls-cli") / "artifacts"
    write_artifacts(folder)
    return folder


def flags(issued: Issued) -> list[str]:
    return ["--tls-cert", str(issued.certificate), "--tls-key", str(issued.key)]


def assert_refused(
    capsys: pytest.CaptureFixture[str], artifacts: Path, words: Sequence[str], *parts: str
) -> None:
    """Of `check-config` as of a start: they read the files alike."""
    assert cli.main(["check-config", "--artifacts", str(artifacts), *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def test_files_without_a_certificate(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--tls-key", "--tls-client-ca"):
        words = (flag, "x.pem")
        assert_refused(capsys, artifacts, words, f"{flag} needs a certificate: --tls-cert FILE")


def test_files_that_are_not_there(
    artifacts: Path, authority: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    issued = authority.issue("server")
    words = ["--tls-cert", "gone.pem"]
    assert_refused(capsys, artifacts, words, "--tls-cert: ", "gone.pem", "No such file")
    words = [*flags(issued), "--tls-client-ca", "gone.pem"]
    assert_refused(capsys, artifacts, words, "--tls-cert: ", "gone.pem", "No such file")
    words = ["--tls-cert", str(issued.certificate)]
    assert_refused(capsys, artifacts, words, "no certificate with its key in")
    words = ["--broker", "mqtts://u:p@h", "--broker-ca", "gone.pem"]
    assert_refused(capsys, artifacts, words, "the broker's TLS: ", "gone.pem", "No such file")


def test_good_files(
    artifacts: Path, authority: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    issued = authority.issue("server")
    words = [*flags(issued), "--tls-client-ca", str(authority.ca), "--broker-ca", str(authority.ca)]
    assert cli.main(["check-config", "--artifacts", str(artifacts), *words]) == 0
    shown = capsys.readouterr().out
    for word in words:
        assert word.removeprefix("--") in shown
