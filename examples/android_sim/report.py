"""What a run leaves for a person and for a program: a table, a summary, learning curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from rich.table import Table

from petalfl.http import HttpClient

from .history import Settings
from .server_process import ServerAddress
from .simulation import Device

History = Mapping[int, Mapping[str, Mapping[str, float]]]  # by rounds trained, by device


def summarize(
    settings: Settings,
    server: ServerAddress,
    devices: Sequence[Device],
    history: History,
    wall_s: float,
) -> dict[str, Any]:
    """Joins what the server counted with what the devices measured.

    Args:
        history: Of every device, before the first round (0) and after the last; one more where
            devices fine-tune.
        wall_s: From the start of the devices to the end of the last round.
    """
    http = HttpClient(server.url)
    http.use_token(server.token)
    status, rounds, traffic = (
        http.get_json(f"/v1/default/{what}") for what in ("status", "rounds", "devices")
    )
    last = max(history)
    finished = history[last] if last > status["round_num"] else {}
    before, after = history[0], history[last - 1 if finished else last]
    for entry in rounds:
        entry["mean_macro_f1"] = _mean(history.get(entry["round_num"], {}), "macro_f1")
    return {
        **asdict(settings),
        "scheme": scheme_of(status["private_blocks"]),  # a server that ran already has its own
        "private_blocks": status["private_blocks"],
        "mean_macro_f1_before": _mean(before, "macro_f1"),
        "mean_macro_f1_after": _mean(after, "macro_f1"),
        "mean_macro_f1_finished": _mean(finished, "macro_f1"),
        "mean_accuracy_before": _mean(before, "accuracy"),
        "mean_accuracy_after": _mean(after, "accuracy"),
        "mean_accuracy_finished": _mean(finished, "accuracy"),
        "totals": {
            "wall_s": round(wall_s, 3),
            "rounds": status["round_num"],
            "updates_accepted": status["updates_accepted"],
            "bytes_up": status["bytes_up"],
            "bytes_down": status["bytes_down"],
        },
        "devices": {
            device.name: {
                "modalities": list(device.modalities),
                "blocks_held": _blocks_held(device, status),
                "train_windows": len(device.data.train),
                "test_windows": len(device.data.test),
                "before": before.get(device.name),
                "after": after[device.name],
                "finished": finished.get(device.name),
                "traffic": traffic[device.name]["blocks"],
            }
            for device in devices
        },
        "rounds": rounds,
    }


def scheme_of(private_blocks: Sequence[str]) -> str:
    """The sharing scheme's name, as `--scheme` has it."""
    if any(name.startswith("encoder-") for name in private_blocks):
        return "local"
    others = [name for name in private_blocks if not name.endswith("-personal")]
    return {0: "personal" if private_blocks else "fm", 1: "ph", 2: "phf"}[len(others)]


def table(summary: Mapping[str, Any]) -> Table:
    """One row a device, and the mean."""
    result = Table(
        title=f"{summary['regime']}, {summary['scheme']}: {summary['totals']['rounds']} rounds, "
        f"seed {summary['seed']}",
        title_justify="left",
    )
    for heading in ("device", "modalities", "shares"):
        result.add_column(heading)
    is_fine = summary["mean_macro_f1_finished"] is not None
    scores = ["F1 before", "F1 after", "acc. after", *(["F1 fine-tuned"] if is_fine else [])]
    for heading in ("train", "test", *scores, "MB up", "MB down"):
        result.add_column(heading, justify="right")
    for name, device in summary["devices"].items():
        traffic = device["traffic"].values()
        before = device["before"]
        result.add_row(
            name,
            " + ".join(device["modalities"]),
            ", ".join(b for b in device["blocks_held"] if b not in summary["private_blocks"])
            or "–",
            str(device["train_windows"]),
            str(device["test_windows"]),
            f"{before['macro_f1']:.3f}" if before else "–",
            f"{device['after']['macro_f1']:.3f}",
            f"{device['after']['accuracy']:.3f}",
            *([f"{device['finished']['macro_f1']:.3f}"] if is_fine else []),
            f"{sum(t['bytes_up'] for t in traffic) / 1e6:.1f}",
            f"{sum(t['bytes_down'] for t in traffic) / 1e6:.1f}",
        )
    totals = summary["totals"]
    result.add_section()
    result.add_row(
        "mean / total", "", "", "", "",
        f"{summary['mean_macro_f1_before']:.3f}", f"{summary['mean_macro_f1_after']:.3f}",
        f"{summary['mean_accuracy_after']:.3f}",
        *([f"{summary['mean_macro_f1_finished']:.3f}"] if is_fine else []),
        f"{totals['bytes_up'] / 1e6:.1f}", f"{totals['bytes_down'] / 1e6:.1f}",
        style="bold",
    )  # fmt: skip
    return result


def draw_curves(summary: Mapping[str, Any], history: History, path: Path) -> None:
    """Macro-F1 after each round: the devices' mean by modality set, and the spread of all."""
    kinds: dict[str, list[str]] = {}
    for name, device in summary["devices"].items():
        kinds.setdefault(" + ".join(device["modalities"]), []).append(name)
    names = list(summary["devices"])
    rounds = [r for r, by_device in history.items() if set(names) <= by_device.keys()]
    scores = np.array([[history[r][name]["macro_f1"] for name in names] for r in rounds])
    fine_tuned = None
    if summary["mean_macro_f1_finished"] is not None:  # no round, but what comes after the last
        fine_tuned, scores, rounds = scores[-1].mean(), scores[:-1], rounds[:-1]
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    low, high = np.quantile(scores, [0.1, 0.9], axis=1)
    axes.fill_between(rounds, low, high, alpha=0.15, color="black", label="10–90 % of devices")
    axes.plot(rounds, scores.mean(axis=1), color="black", linewidth=2.5, label="all devices, mean")
    if fine_tuned is not None:
        axes.plot(
            rounds[-1], fine_tuned, "k*", markersize=12, clip_on=False, label="fine-tuned, mean"
        )
    for kind, members in sorted(kinds.items()):
        columns = [names.index(name) for name in members]
        axes.plot(rounds, scores[:, columns].mean(axis=1), label=f"{kind} ({len(members)})")
    axes.axhline(1 / 7, color="gray", linestyle=":", label="chance")
    axes.set(
        xlabel="rounds trained",
        ylabel="macro-F1 on the device's own test windows",
        ylim=(0, 1),
        xlim=(0, max(rounds)),
        title=f"Watch data, {len(names)} devices, {summary['regime']} modalities, "
        f"{summary['scheme']}, seed {summary['seed']}",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path)


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """As indented JSON."""
    path.write_text(json.dumps(summary, indent=1) + "\n")


def _blocks_held(device: Device, status: Mapping[str, Any]) -> list[str]:
    foreign = {f"encoder-{m}" for m in ("acc", "gyro") if m not in device.modalities}
    blocks = [*status["shared_blocks"], *status["private_blocks"]]
    return [block for block in sorted(blocks) if block not in foreign]


def _mean(metrics: Mapping[str, Mapping[str, float]], key: str) -> float | None:
    return float(np.mean([m[key] for m in metrics.values()])) if metrics else None
