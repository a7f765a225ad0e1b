"""Tables of the results, as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from examples.android_sim.regimes import REGIMES

from .cells import MISSING, PROTOCOL, Cell
from .datasets import DATASETS
from .results import Line
from .schemes import SCHEMES

VARIED = ("scheme", "regime", "missing", "seed")  # within a table; all else is its setting
PAIRS = (
    ("phf", "fm"), ("ph", "fm"), ("phf", "local"),
    ("two-heads", "fm"), ("two-heads", "phf"), ("two-heads", "local"),
)  # fmt: skip
PAPER_GAINS = {"incomplete": 18.7, "exclusive": 37.7}  # %, BLOSSOM's averages over full-model
RISING_POINTS = 1.0  # a curve that gains more in its last fifth than this has not converged


class Setting(NamedTuple):
    """What the cells of a table have in common, and the cells' lines."""

    common: dict[str, Any]
    lines: list[Line]

    @property
    def metric(self) -> str:
        """What is reported of the data set."""
        return DATASETS[self.common["dataset"]].metric

    @property
    def title(self) -> str:
        """For a heading."""
        c = self.common
        parts = [c["dataset"], f"partition {c['partition']}", f"{c['rounds']} rounds"]
        if c["data_fraction"] < 1:
            parts.append(f"{100 * c['data_fraction']:g} % of the data")
        parts += [f"{name.replace('_', ' ')} {value}" for name, value in unusual(c).items()]
        return ", ".join(parts)

    @property
    def stages(self) -> dict[str, str]:
        """The stages' names, by where a line holds their scores; one if there is no finish."""
        stages = {"final": "after the last round", "finished": "after the finish"}
        return stages if self.common["finish_epochs"] else {"final": stages["final"]}

    def of(self, scheme: str, regime: str, missing: str) -> dict[int, Line]:
        """Lines by seed."""
        wanted = (scheme, regime, missing)
        return {
            line["cell"]["seed"]: line
            for line in self.lines
            if tuple(line["cell"][k] for k in ("scheme", "regime", "missing")) == wanted
        }

    def columns(self) -> list[tuple[str, str]]:
        """The regimes and treatments of missing modalities that there are, in their order."""
        found = {(line["cell"]["regime"], line["cell"]["missing"]) for line in self.lines}
        return [(r, m) for r in REGIMES for m in MISSING if (r, m) in found]

    def schemes(self) -> list[str]:
        """Those that there are, in the registry's order, and then any it no longer has."""
        found = {line["cell"]["scheme"] for line in self.lines}
        return [*(s for s in SCHEMES if s in found), *sorted(found - SCHEMES.keys())]


def settings_of(lines: Iterable[Line]) -> list[Setting]:
    """Lines of today's protocol, by what their cells have in common but for `VARIED`."""
    by_key: dict[str, Setting] = {}
    for line in lines:
        if line["protocol"] != PROTOCOL:
            continue
        common = {k: v for k, v in line["cell"].items() if k not in VARIED}
        setting = by_key.setdefault(json.dumps(common, sort_keys=True), Setting(common, []))
        setting.lines.append(line)
    return list(by_key.values())


def unusual(common: Mapping[str, Any]) -> dict[str, Any]:
    """What is neither the data set's nor the study's default; without what a title says."""
    usual = {f.name: f.default for f in Cell.__dataclass_fields__.values()}
    usual |= DATASETS[common["dataset"]].training
    said = ("dataset", "partition", "rounds", "data_fraction")
    return {k: v for k, v in common.items() if k not in said and v != usual.get(k)}


def command(setting: Setting) -> str:
    """Runs the cells of a table again, or those that are missing."""
    c = setting.common
    seeds = sorted({line["cell"]["seed"] for line in setting.lines})
    regimes = [r for r in REGIMES if any(r == regime for regime, _ in setting.columns())]
    missing = [m for m in MISSING if any(m == found for _, found in setting.columns())]
    options: dict[str, Any] = {
        "dataset": c["dataset"], "partition": c["partition"], "regime": ",".join(regimes),
        "scheme": ",".join(setting.schemes()), "missing": ",".join(missing),
        "data-fraction": f"{c['data_fraction']:g}", "rounds": c["rounds"],
        **{name.replace("_", "-"): value for name, value in unusual(c).items()},
    }  # fmt: skip
    if seeds == [*range(len(seeds))]:
        options["seeds"] = len(seeds)
    else:
        options["seed"] = ",".join(map(str, seeds))
    flags = " ".join(f"--{name} {value}" for name, value in options.items())
    return f"python -m benchmarks.blossom {flags}"


def scores_table(setting: Setting, stage: str) -> str:
    """A row for each scheme: mean ± standard deviation over seeds, in points.

    Args:
        stage: As in `Setting.stages`.
    """
    rows = []
    for scheme in setting.schemes():
        cells = []
        for regime, missing in setting.columns():
            lines = setting.of(scheme, regime, missing)
            values = [100 * line[stage][setting.metric] for line in lines.values()]
            mark = "†" if any(is_rising(line, setting.metric) for line in lines.values()) else ""
            cells.append(mean_and_spread(values) + mark)
        rows.append([f"`{scheme}`", *cells])
    return _table(["scheme", *(_heading(*column) for column in setting.columns())], rows)


def differences_table(setting: Setting) -> str:
    """Paired differences, seed by seed, in points; and the relative gain next to the paper's."""
    on_the_way = _rounds_on_the_way(setting)
    rows = []
    for regime, missing in setting.columns():
        pairs = {
            f"{better} – {worse}": [setting.of(s, regime, missing) for s in (better, worse)]
            for better, worse in PAIRS
        }
        if missing != "mask":
            pairs |= {
                f"{scheme}, mask – {missing}": [
                    setting.of(scheme, regime, treatment) for treatment in ("mask", missing)
                ]
                for scheme in setting.schemes()
            }
        for name, (a, b) in pairs.items():
            cells = [name, _heading(regime, missing)]
            cells += [_paired(a, b, num_rounds, setting.metric) for num_rounds in on_the_way]
            for stage in setting.stages:
                cells += [_paired(a, b, stage, setting.metric), ""]
                if name.endswith("– fm") and regime in PAPER_GAINS and missing == "mask":
                    cells[-1] = _relative(a, b, stage, setting.metric)
            if a.keys() & b.keys():
                rows.append(cells)
    headings = ["difference", "regime", *(f"{n} rounds" for n in on_the_way)]
    for name in setting.stages.values():
        headings += [name, "gain"]
    return _table(headings, rows) if rows else ""


def _rounds_on_the_way(setting: Setting) -> list[int]:
    """The points of the curves next to a quarter, half and three quarters of the rounds."""
    curves = ({point[0] for point in line["curve"]} for line in setting.lines)
    common = sorted(set.intersection(*curves))
    num_rounds = setting.common["rounds"]
    nearest = (min(common, key=lambda n: abs(n - part * num_rounds)) for part in (0.25, 0.5, 0.75))
    return sorted({*nearest} - {0, num_rounds})


def paper_gains() -> str:
    """In words."""
    return ", ".join(f"{regime} {gain:+.1f} %" for regime, gain in PAPER_GAINS.items())


def unseen_table(setting: Setting) -> str:
    """What unseen people get, by scheme and modalities, after some local rounds."""
    rows = []
    rounds: list[str] = []
    for regime, missing in setting.columns():
        for scheme in setting.schemes():
            lines = [x for x in setting.of(scheme, regime, missing).values() if x["unseen"]]
            for kind in lines[0]["unseen"] if lines else ():
                rounds = rounds or sorted(lines[0]["unseen"][kind], key=int)
                values = [
                    mean_and_spread([100 * x["unseen"][kind][n][setting.metric] for x in lines])
                    for n in rounds
                ]
                rows.append([f"`{scheme}`", _heading(regime, missing), kind, *values])
    headings = ["day one", *(f"{n} local round{'s' * (n != '1')}" for n in rounds[1:])]
    return _table(["scheme", "trained", "modalities", *headings], rows) if rows else ""


def traffic_table(setting: Setting) -> str:
    """Bytes that a device sends, and what they buy."""
    rows = []
    for regime, missing in setting.columns():
        for scheme in setting.schemes():
            lines = list(setting.of(scheme, regime, missing).values())
            if not lines:
                continue
            up = _mb_up(lines)
            score = np.mean([100 * x["final"][setting.metric] for x in lines])
            per_mb = f"{score / up:.2f}" if up else "–"
            rows.append([f"`{scheme}`", _heading(regime, missing),
                         f"{up:.2f}", f"{score:.1f}", per_mb])  # fmt: skip
    return _table(["scheme", "regime", "MB up per device", "last round", "points per MB"], rows)


def codecs_table(lines: Iterable[Line]) -> str:
    """What codecs save and cost: of cells that differ in their codec alone, seed by seed."""
    families: dict[str, dict[str, dict[int, Line]]] = {}
    for line in lines:
        if line["protocol"] == PROTOCOL:
            rest = {k: v for k, v in line["cell"].items() if k not in ("codec", "seed")}
            by_codec = families.setdefault(json.dumps(rest), {})
            by_codec.setdefault(line["cell"]["codec"], {})[line["cell"]["seed"]] = line
    rows = []
    for family, by_codec in families.items():
        cell, plain = json.loads(family), by_codec.get("f32", {})
        metric = DATASETS[cell["dataset"]].metric
        common = sorted(plain.keys() & set().union(*(b for c, b in by_codec.items() if c != "f32")))
        for codec, by_seed in by_codec.items() if common else ():
            chosen = {s: by_seed[s] for s in common if s in by_seed}
            full, sent = (_mb_up(x[s] for s in chosen) for x in (plain, by_seed))
            scores = [100 * x["finished"][metric] for x in chosen.values()]
            rows.append([
                cell["dataset"], _heading(cell["regime"], cell["missing"]), f"`{cell['scheme']}`",
                f"`{codec}`", f"{sent:.2f}", f"{full / sent:.1f} ×" if sent else "–",
                mean_and_spread(scores),
                "" if codec == "f32" else _paired(chosen, plain, "finished", metric),
                f"{np.mean(scores) / sent:.2f}" if sent else "–",
            ])  # fmt: skip
    headings = ("data", "regime", "scheme", "codec", "MB up per device", "fewer bytes",
                "after the finish", "to f32", "points per MB")  # fmt: skip
    return _table(headings, rows) if rows else ""


COLUMNS = {"macro_f1": 1, "accuracy": 2}  # of a curve; before them its rounds


def is_rising(line: Line, metric: str) -> bool:
    """Whether the curve gains more than `RISING_POINTS` in its last fifth over the fifth before."""
    curve, end = line["curve"], line["cell"]["rounds"]
    last = [point[COLUMNS[metric]] for point in curve if point[0] > 0.8 * end]
    before = [point[COLUMNS[metric]] for point in curve if 0.6 * end < point[0] <= 0.8 * end]
    if not last or not before:
        return True  # nobody knows
    return bool(100 * (np.mean(last) - np.mean(before)) > RISING_POINTS)


NOT_RUN = "not run yet"


def mean_and_spread(values: Sequence[float]) -> str:
    """``mean ± standard deviation``, the latter of a sample, and how many where it is one."""
    if not values:
        return NOT_RUN
    if len(values) == 1:
        return f"{values[0]:.1f} (1)"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def _mb_up(lines: Iterable[Line]) -> float:
    """Millions of bytes that a device sends, on average."""
    of_cells = [np.mean([d["bytes_up"] for d in x["devices"].values()]) for x in lines]
    return float(np.mean(of_cells)) / 1e6


def _paired(a: Mapping[int, Line], b: Mapping[int, Line], at: str | int, metric: str) -> str:
    """At a stage of `Setting.stages`, or after so many rounds of the curve."""

    def score(line: Line) -> float:
        if isinstance(at, str):
            return float(line[at][metric])
        return float(next(p[COLUMNS[metric]] for p in line["curve"] if p[0] == at))

    values = [100 * (score(a[seed]) - score(b[seed])) for seed in sorted(a.keys() & b.keys())]
    text = mean_and_spread(values)
    return text if text.startswith("-") or not values else f"+{text}"


def _relative(a: Mapping[int, Line], b: Mapping[int, Line], stage: str, metric: str) -> str:
    seeds = sorted(a.keys() & b.keys())
    ours, theirs = (sum(x[s][stage][metric] for s in seeds) for x in (a, b))
    ratio = ours / theirs if theirs else math.inf
    return f"{100 * (ratio - 1):+.1f} %"


def _heading(regime: str, missing: str) -> str:
    return regime if regime == "complete" else f"{regime}, {missing}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(headings), " | ".join("---" for _ in headings), *map(" | ".join, rows)]
    return "\n".join(f"| {line} |" for line in lines)
