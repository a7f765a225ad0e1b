from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.blossom.__main__ import _options as parse
from benchmarks.blossom.__main__ import cells_of, main
from benchmarks.blossom.cells import Cell
from benchmarks.blossom.report import BEGIN, END, write_report
from benchmarks.blossom.results import Results, ResultsError
from benchmarks.blossom.tables import command, is_rising, mean_and_spread, settings_of
from petalfl.errors import PetalError

ROOT = Path(__file__).parents[3]
SECOND_CELL = Path(__file__).parent / "second_cell"
TIMEOUT_S = 120.0


def line(scheme: str = "fm", seed: int = 0, f1: float = 0.5, **changes: Any) -> dict[str, Any]:
    cell = Cell("watch", "exclusive", scheme, "mask", "natural", 1.0, seed, 10, **changes)
    scores = {"macro_f1": f1, "accuracy": f1 + 0.1}
    device = {"modalities": ["acc"], "num_train": 9, "num_test": 3, "final": scores,
              "finished": scores, "bytes_up": 2_000_000 if scheme != "local" else 0}  # fmt: skip
    return {
        "protocol": 1,
        "cell": {name: getattr(cell, name) for name in Cell.__dataclass_fields__},
        "final": {"macro_f1": f1 - 0.1, "accuracy": f1},
        "finished": scores,
        "curve": [[n, f1 - 0.1, f1] for n in range(11)],
        "devices": {"d": device},
        "unseen": {"acc": dict.fromkeys(("0", "1", "10", "3"), scores)},  # as they are read again
        "seconds": 12.5,
        "seconds_in_rounds": 10.0,
        "machine": {"cpu": "a processor", "cores": 2, "load": 1.5},
    }


def test_lines_are_kept_and_found_again(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    assert results.lines() == []
    written = [line(seed=0), line(seed=1)]
    for one in written:
        results.append(one)
    assert results.lines() == results.lines("watch") == written
    assert results.lines("stress") == []
    cells = [Cell(**one["cell"]) for one in [*written, line(seed=2)]]
    assert results.missing(cells) == cells[2:]
    results.append({**line(seed=2), "protocol": 0})  # of another time: it has to run again
    assert results.missing(cells) == cells[2:]


def test_a_torn_line_is_run_again(tmp_path: Path) -> None:
    results, path = Results(tmp_path), tmp_path / "watch.jsonl"
    results.append(line(seed=0))
    with path.open("a") as file:
        file.write(json.dumps(line(seed=1))[:100])
    assert results.lines() == [line(seed=0)]
    results.append(line(seed=2))
    assert results.lines() == [line(seed=0), line(seed=2)]


@pytest.mark.parametrize("bad", ["{}", "[]", "not json", '{"protocol": 1}'])
def test_a_line_that_is_none_is_named(bad: str, tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append(line())
    with (tmp_path / "watch.jsonl").open("a") as file:
        file.write(f"{bad}\n")
    with pytest.raises(ResultsError, match=r"watch.jsonl, line 2 is no result .* restore it"):
        results.lines()


def test_the_page(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\n## After\n")
    lines = [line("fm", s, 0.5 + 0.1 * s) for s in range(3)]
    lines += [line("phf", s, 0.7 + 0.1 * s) for s in range(3)]
    lines += [line("local", 0, 0.6), line("local", 0, 0.6) | {"protocol": 0}]
    first, *figures = write_report(lines, page)
    text = page.read_text()
    assert first == page and text.startswith("# Before\n") and text.endswith("## After\n")
    assert "old" not in text
    assert "| scheme | exclusive, mask |\n| --- | --- |\n| `fm` | 60.0 ± 10.0 |" in text
    assert "| `phf` | 70.0 ± 10.0 |\n| `local` | 50.0 (1) |" in text  # after the last round
    assert "gains over the full model (the paper's, on average: incomplete +18.7 %, " in text
    way = " | ".join(["+20.0 ± 0.0"] * 3)
    row = f"| phf – fm | exclusive, mask | {way} | +20.0 ± 0.0 | +40.0 % | +20.0 ± 0.0 | +33.3 % |"
    assert row in text
    way = " | ".join(["+10.0 (1)"] * 3)
    assert f"| phf – local | exclusive, mask | {way} | +10.0 (1) |  | +10.0 (1) |  |" in text
    assert "| `fm` | exclusive, mask | acc | 60.0 ± 10.0 |" in text
    assert "| modalities | day one | 1 local round | 3 local rounds | 10 local rounds |" in text
    assert "| `phf` | exclusive, mask | 2.00 | 70.0 | 35.00 |" in text
    assert "| `local` | exclusive, mask | 0.00 | 50.0 | – |" in text
    assert "a processor, 2 cores; load average 1.5 to 1.5" in text
    (figure,) = figures
    assert figure.read_bytes().startswith(b"\x89PNG") and f"images/{figure.name}" in text
    written = text
    write_report(lines, page)
    assert page.read_text() == written


def test_without_a_finish_there_is_nothing_after_it(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"{BEGIN}{END}")
    write_report([line(s, 0, finish_epochs=0) for s in ("fm", "phf")], page)
    text = page.read_text()
    assert "After the last round:" in text and "fter the finish" not in text
    assert "| 7 rounds | after the last round | gain |" in text


def test_differences_on_the_way_and_between_treatments_of_what_is_missing(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"{BEGIN}{END}")
    masked, filled = line("fm", 0, 0.7), line("fm", 0, 0.5)
    filled["cell"]["missing"] = "zero"
    filled["curve"] = [[n, 0.01 * n, 0.5] for n in range(11)]
    write_report([masked, filled], page)
    text = page.read_text()
    assert "| difference | regime | 2 rounds | 5 rounds | 7 rounds | after the last round |" in text
    row = "| fm, mask – zero | exclusive, zero | +58.0 (1) | +55.0 (1) | +53.0 (1) | +20.0 (1) |"
    assert row in text


def test_the_command_of_a_table_runs_its_cells() -> None:
    lines = [line(s, n, learning_rate=0.1, unseen=2) for s in ("fm", "phf") for n in (0, 1, 2)]
    (setting,) = settings_of(lines)
    flags = command(setting).split()
    assert flags[:3] == ["python", "-m", "benchmarks.blossom"]
    asked = {cell.key for cell in cells_of(parse(flags[3:]))}
    assert asked == {Cell(**one["cell"]).key for one in lines}


def test_codecs_are_compared_on_the_seeds_that_both_have(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"{BEGIN}{END}")
    lines = [line("fm", s, 0.5 + 0.1 * s) for s in range(3)]
    lines += [line("fm", s, 0.6 + 0.1 * s, codec="int8") for s in (0, 1)]
    lines += [line("ph", 0, 0.5), line("phf", 1, 0.5, codec="int8")]  # with nothing to compare
    for one in lines:
        if one["cell"]["codec"] == "int8":
            one["devices"]["d"]["bytes_up"] = 500_000
    write_report(lines, page)
    rows = [row for row in page.read_text().splitlines() if row.startswith("| watch | ")]
    start = "| watch | exclusive, mask | `fm` |"
    assert rows == [
        f"{start} `f32` | 2.00 | 1.0 × | 55.0 ± 7.1 |  | 27.50 |",
        f"{start} `int8` | 0.50 | 4.0 × | 65.0 ± 7.1 | +10.0 ± 0.0 | 130.00 |",
    ]


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    with pytest.raises(PetalError, match="cannot read"):
        write_report([], page)
    page.write_text("# Mine\n")
    with pytest.raises(PetalError, match="expected a part between"):
        write_report([], page)
    assert page.read_text() == "# Mine\n"


def test_a_curve_that_rises_is_told_from_one_that_does_not() -> None:
    flat, rising, short = line(), line(), line()
    rising["curve"] = [[n, n / 20, n / 20] for n in range(11)]
    short["curve"] = [[0, 0.1, 0.1], [10, 0.1, 0.1]]
    assert not is_rising(flat, "macro_f1")
    assert is_rising(rising, "macro_f1") and is_rising(short, "macro_f1")


def test_mean_and_spread() -> None:
    assert mean_and_spread([]) == "not run yet"
    assert mean_and_spread([1.0]) == "1.0 (1)"
    assert mean_and_spread([1.0, 3.0]) == "2.0 ± 1.4"  # of a sample: the root of 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--scheme", "nope"], "scheme 'nope': expected one of fm, ph"),
        (["--dataset", "nope"], "dataset 'nope': expected one of watch, avdigits, stress"),
        (["--partition", "dirichlet:-1"], "expected natural, iid or dirichlet:ALPHA"),
        (["--rounds", "0"], "rounds 0: expected at least 1"),
        (["--optimizer", "lion"], "optimizer"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_list(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = Results(tmp_path)
    options = ["--regime", "exclusive", "--scheme", "fm,phf", "--rounds", "10", "--seeds", "1"]
    results.append(line())
    assert main([*options, "--list", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "done  watch, exclusive, fm, mask, natural, seed 0",
        "to do watch, exclusive, phf, mask, natural, seed 0",
        f"2 cells, 1 to do; results in {tmp_path}",
    ]


def test_a_killed_study_goes_on(watch_artifacts: Path, tmp_path: Path) -> None:
    """kill -9 amid the second cell: the second command runs the others alone."""
    cache, out = tmp_path / "cache", tmp_path / "results"
    shutil.copytree(watch_artifacts, cache / "watch-mask-0")
    command = [
        sys.executable, "-m", "benchmarks.blossom", "--regime", "exclusive",
        "--scheme", "local,fm", "--data-fraction", "0.05", "--devices", "2", "--rounds", "2",
        "--seed", "0", "--finish-epochs", "1", "--out", str(out), "--cache", str(cache),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'sdk'}{os.pathsep}{ROOT}"}
    hangs = {**environment, "PYTHONPATH": f"{SECOND_CELL}{os.pathsep}{environment['PYTHONPATH']}"}
    process = subprocess.Popen(command, cwd=ROOT, env=hangs, stderr=subprocess.DEVNULL)
    give_up_s = time.monotonic() + TIMEOUT_S
    children: list[psutil.Process] = []
    while len(children) < 2:  # one of them is multiprocessing's own
        assert process.poll() is None and time.monotonic() < give_up_s
        time.sleep(0.02)
        if Results(out).lines():
            children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, TIMEOUT_S)  # they have lost their parent
    assert not alive
    (kept,) = Results(out).lines()
    assert kept["cell"]["scheme"] == "local"

    again = subprocess.run([*command, "--json"], cwd=ROOT, env=environment, timeout=TIMEOUT_S,
                           capture_output=True, text=True, check=True)  # fmt: skip
    lines = Results(out).lines()
    assert lines[0] == kept and [one["cell"]["scheme"] for one in lines] == ["local", "fm"]
    assert [json.loads(text) for text in again.stdout.splitlines()] == lines
    assert not list(Path("/dev/shm").glob(f"petalfl-blossom-{process.pid}-*"))
