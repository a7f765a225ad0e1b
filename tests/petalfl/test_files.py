from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from petalfl.files import write_atomic


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"old", b"", bytes(range(256)) * 1000):
        write_atomic(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_mode_does_not_depend_on_the_umask(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o777 - 0o400)
    try:
        write_atomic(tmp_path / "file", b"x", mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_private_unless_told_otherwise(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", b"x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_data_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that a power cut asks for: data, fsync, rename, fsync of the folder."""
    steps = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(fd: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"{os.fstat(fd).st_size} bytes"
        steps.append(kind)
        fsync(fd)

    def note_replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomic(tmp_path / "file", b"12345")
    assert steps == ["5 bytes", "rename", "folder"]


def test_a_crash_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def crash(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomic(path, b"newer")  # what the crash left behind is in nobody's way
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]  # it does not fill the disk up further


def test_the_old_file_stays_as_previous(tmp_path: Path) -> None:
    path, previous = tmp_path / "file", tmp_path / "file.previous"
    write_atomic(path, b"1", previous=previous)
    assert not previous.exists()
    for old, new in ((b"1", b"2"), (b"2", b"3")):
        write_atomic(path, new, previous=previous)
        assert (path.read_bytes(), previous.read_bytes()) == (new, old)


@pytest.mark.parametrize("num_renames", [0, 1])
def test_the_old_file_is_there_whatever_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_renames: int
) -> None:
    path, previous = tmp_path / "file", tmp_path / "file.previous"
    write_atomic(path, b"old")
    real, left = Path.replace, [None] * num_renames

    def fail(self: Path, target: Path) -> Path:
        if not left:
            raise OSError(5, "Input/output error")
        left.pop()
        return real(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomic(path, b"new", previous=previous)
    assert list(tmp_path.iterdir()) == [previous if num_renames else path]
    assert (previous if num_renames else path).read_bytes() == b"old"


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "absent" / "file", b"x")
