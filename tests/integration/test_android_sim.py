"""`python -m examples.android_sim` as a person starts it, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from examples.android_sim.__main__ import main

pytestmark = pytest.mark.usefixtures("numpy_reducer")  # but the one whose summary is looked at

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "examples.android_sim", "--finish-epochs", "0"]
ENCODER_BYTES = 4 * 150_976


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )


def leftovers(out: Path) -> list[str]:
    """Command lines of processes that still belong to a run in that folder."""
    return [
        " ".join(process.info["cmdline"])
        for process in psutil.process_iter(["cmdline"])
        if str(out) in " ".join(process.info["cmdline"] or [])
    ]


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("demo") / "run"
    done = run("--devices", "5", "--rounds", "2", "--scheme", "phf", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "macro-F1" in done.stdout and "subject-01-left" in done.stdout
    assert (out / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert leftovers(out) == []
    loaded: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return loaded


def test_the_summary_holds_every_round_and_block(summary: dict[str, Any]) -> None:
    assert summary["seed"] == 0
    assert [entry["round_num"] for entry in summary["rounds"]] == [1, 2]
    for entry in summary["rounds"]:
        assert entry["blocks"].keys() == {"encoder-acc", "encoder-gyro"}
        for name, block in entry["blocks"].items():
            holders = [d for d, v in summary["devices"].items() if name in v["blocks_held"]]
            assert block["version"] == entry["round_num"] + 1
            assert block["holders"] == holders
            assert block["num_examples"] == sum(
                summary["devices"][d]["train_windows"] for d in holders
            )
            assert block["bytes_down"] == ENCODER_BYTES * len(holders)
            # Five chunks, a manifest and a fin each: a little more than the payload itself.
            payload = ENCODER_BYTES * len(holders)
            assert payload < block["bytes_up"] < 1.01 * payload


def test_a_device_moves_only_its_own_encoders(summary: dict[str, Any]) -> None:
    kinds = set()
    for device in summary["devices"].values():
        kinds.add(tuple(device["modalities"]))
        own = {f"encoder-{modality}" for modality in device["modalities"]}
        assert device["traffic"].keys() == own
        assert set(device["blocks_held"]) == own | {"fusion", "head"}
        for traffic in device["traffic"].values():
            assert traffic["bytes_up"] > 2 * ENCODER_BYTES
            assert traffic["bytes_down"] == 3 * ENCODER_BYTES  # two rounds and the last version
    assert kinds == {("acc",), ("gyro",), ("acc", "gyro")}


def test_the_summary_holds_scores_and_totals(summary: dict[str, Any]) -> None:
    for device in summary["devices"].values():
        for when in ("before", "after"):
            assert 0 <= device[when]["macro_f1"] <= 1 and 0 <= device[when]["accuracy"] <= 1
    assert summary["mean_macro_f1_before"] < 0.25
    assert summary["mean_macro_f1_finished"] is None, "no fine-tuning was asked for"
    totals = summary["totals"]
    assert totals["updates_accepted"] == 2 * sum(
        len(d["modalities"]) for d in summary["devices"].values()
    )
    assert totals["wall_s"] > 0
    assert totals["bytes_up"] == sum(
        block["bytes_up"] for entry in summary["rounds"] for block in entry["blocks"].values()
    )


def test_a_personal_head_and_what_fine_tuning_comes_to(tmp_path: Path) -> None:
    done = run("--devices", "3", "--rounds", "2", "--finish-epochs", "3", "--out",
               str(tmp_path / "run"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    means = [summary[f"mean_macro_f1_{when}"] for when in ("before", "after", "finished")]
    for when, mean in zip(("before", "after", "finished"), means, strict=True):
        scores = [device[when]["macro_f1"] for device in summary["devices"].values()]
        assert mean == pytest.approx(sum(scores) / 3)
    assert means[2] not in means[:2]
    assert summary["rounds"][-1]["mean_macro_f1"] == means[1]
    assert (summary["scheme"], summary["private_blocks"]) == ("personal", ["head-personal"])
    for device in summary["devices"].values():
        assert {*device["blocks_held"]} == {*device["traffic"], "head-personal"}
    assert "fine-tuning: every device alone" in done.stderr
    assert "F1 fine-tuned" in done.stdout and f"→ {means[2]:.3f} fine-tuned in" in done.stdout


def test_local_shares_nothing_and_still_trains(tmp_path: Path, watch_artifacts: Path) -> None:
    done = run("--devices", "3", "--rounds", "2", "--scheme", "local", "--json",
               "--artifacts", str(watch_artifacts), "--out", str(tmp_path / "run"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["totals"]["bytes_up"] == summary["totals"]["bytes_down"] == 0
    assert summary["totals"]["updates_accepted"] == 0
    assert all(entry["blocks"] == {} for entry in summary["rounds"])
    assert [entry["loss"] for entry in summary["rounds"]] == sorted(
        (entry["loss"] for entry in summary["rounds"]), reverse=True
    )


def test_ctrl_c_keeps_the_state_and_the_same_command_goes_on(
    tmp_path: Path, watch_artifacts: Path
) -> None:
    out, interrupted = tmp_path / "run", tmp_path / "interrupted"
    arguments = ["--devices", "4", "--rounds", "8", "--artifacts", str(watch_artifacts),
                 "--out", str(out)]  # fmt: skip
    held = [sys.executable, "-m", "tests.integration.held_simulation", "3", str(interrupted),
            *COMMAND[3:]]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*held, *arguments], cwd=REPOSITORY, stderr=log)
        wait_for_round(out, 3, process)
        process.send_signal(signal.SIGINT)
        interrupted.touch()
        assert process.wait(60) == 130
    assert "the same command goes on" in (tmp_path / "log").read_text()
    assert leftovers(out) == []
    assert 3 <= rounds_trained(out) < 8

    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "going on with the unfinished run" in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert [entry["round_num"] for entry in summary["rounds"]] == list(range(1, 9))
    holders = sum(len(d["modalities"]) for d in summary["devices"].values())
    assert summary["totals"]["updates_accepted"] == 8 * holders  # none lost, none counted twice


def test_killed_outright_it_leaves_no_server(tmp_path: Path, watch_artifacts: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*COMMAND, "--devices", "3", "--rounds", "9999", "--artifacts", str(watch_artifacts),
         "--out", str(out)],
        cwd=REPOSITORY, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_round(out, 1, process)
    server = psutil.Process(json.loads((out / "server" / "server.json").read_bytes())["pid"])
    children = server.children(recursive=True)
    assert children  # the embedded broker
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs([server, *children], timeout=60)
    assert alive == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--regime", "sometimes"], "invalid choice: 'sometimes'"),
        (["--devices", "0"], "expected at least 1"),
        (["--devices", "5000"], "ask for fewer devices"),
        (["--artifacts", "no/such/folder"], "python -m export"),
        (["--server", "http://127.0.0.1:9", "--token", "x"], "http://127.0.0.1:9"),
        (["--server", "nonsense"], "http(s)://host:port"),
        (["--broker", "mqtt://a:b@127.0.0.1:9"], "127.0.0.1:9"),
        (["--broker", "carrier-pigeon"], "carrier-pigeon"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path,
    watch_artifacts: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--broker" in arguments:  # which is found out after the export
        arguments = [*arguments, "--artifacts", str(watch_artifacts)]
    assert exit_code_of([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert leftovers(tmp_path) == []


def exit_code_of(arguments: list[str]) -> object:
    """Of the command in this process: importing torch for each would take seconds."""
    try:
        return main(arguments)
    except SystemExit as error:  # argparse's
        return error.code


def test_whether_devices_fine_tune_is_for_the_server_to_say(
    tmp_path: Path, watch_artifacts: Path
) -> None:
    """One that runs already has its own settings, whatever is asked for here."""
    from examples.android_sim.server_process import running_server

    arguments = ["--rounds", "2", "--min-devices", "3"]
    with running_server(watch_artifacts, tmp_path / "data", arguments) as address:
        done = run("--server", address.url, "--token", address.token, "--devices", "3",
                   "--finish-epochs", "3", "--json", "--out", str(tmp_path / "run"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["mean_macro_f1_finished"] is None
    assert summary["mean_macro_f1_after"] == summary["rounds"][-1]["mean_macro_f1"]


def test_a_wrong_token_is_refused(tmp_path: Path, watch_artifacts: Path) -> None:
    from examples.android_sim.server_process import running_server

    with running_server(watch_artifacts, tmp_path / "data", []) as address:
        done = run("--server", address.url, "--token", "wrong", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "401" in done.stderr and "token" in done.stderr


def wait_for_round(out: Path, round_num: int, process: subprocess.Popen[bytes]) -> None:
    give_up_s = time.monotonic() + 120
    while rounds_trained(out) < round_num:
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < give_up_s
        time.sleep(0.05)


def rounds_trained(out: Path) -> int:
    """The last round that some device has begun."""
    path = out / "history.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return max((json.loads(line)["round_num"] + 1 for line in whole.splitlines()), default=0)
