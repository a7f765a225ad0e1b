"""What a run has measured so far, on disk after every round, so that it can be gone on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from petalfl.errors import PetalError

_OWN = ("run.json", "history.jsonl", "summary.json", "learning_curves.png")
_OWN_FOLDERS = ("artifacts", "server", "devices")


@dataclass(frozen=True, slots=True)
class Settings:
    """What must be equal for a run to be gone on with."""

    devices: int
    regime: str
    scheme: str
    rounds: int
    seed: int
    learning_rate: float
    server_momentum: float
    codec: str
    server: str
    finish_epochs: int = 0


class RunFolder:
    """The folder of one run: settings, history, and what server and devices keep.

    Args:
        path: Made where it is missing. An unfinished run with the same settings is gone on with,
            a finished one is replaced.
        is_fresh: Replace an unfinished one too.

    Raises:
        PetalError: It holds an unfinished run with other settings, or is no run folder.
    """

    def __init__(self, path: Path, settings: Settings, is_fresh: bool = False) -> None:
        self.path = path
        self._settings = settings
        self.is_resumed = self._open(is_fresh)

    def record(self, device: str, round_num: int, metrics: Mapping[str, float]) -> None:
        """Keeps a device's metrics after ``round_num`` rounds; 0 is before the first.

        Where devices finish by fine-tuning, that counts as one more.
        """
        entry = {"device": device, "round_num": round_num, **metrics}
        with (self.path / "history.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def history(self) -> dict[int, dict[str, dict[str, float]]]:
        """By rounds trained, by device: accuracy and macro_f1."""
        path = self.path / "history.jsonl"
        result: dict[int, dict[str, dict[str, float]]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            entry = json.loads(line)
            metrics = {key: entry[key] for key in ("accuracy", "macro_f1")}
            result.setdefault(entry["round_num"], {})[entry["device"]] = metrics
        return dict(sorted(result.items()))

    def finish(self) -> None:
        """The next run in this folder starts anew."""
        self._write(is_finished=True)

    def _open(self, is_fresh: bool) -> bool:
        run_file = self.path / "run.json"
        if not run_file.exists():
            if self.path.exists() and (self.path.is_file() or any(self.path.iterdir())):
                raise PetalError(f"{self.path} is there and is no run folder; choose another --out")
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(is_finished=False)
            return False
        known = json.loads(run_file.read_bytes())
        if known["is_finished"] or is_fresh:
            self._clear()
        elif known["settings"] != asdict(self._settings):
            raise PetalError(
                f"{self.path} holds an unfinished run with other settings "
                f"({_difference(known['settings'], asdict(self._settings))}); "
                "go on with those, or pass --fresh or another --out"
            )
        is_resumed = run_file.exists()
        self._write(is_finished=False)
        return is_resumed

    def _write(self, is_finished: bool) -> None:
        value = {"settings": asdict(self._settings), "is_finished": is_finished}
        (self.path / "run.json").write_text(json.dumps(value, indent=1) + "\n")

    def _clear(self) -> None:
        for name in _OWN:
            (self.path / name).unlink(missing_ok=True)
        for name in _OWN_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)


def _difference(known: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    return ", ".join(
        f"{key} {known.get(key)!r}, now {value!r}"
        for key, value in wanted.items()
        if known.get(key) != value
    )
