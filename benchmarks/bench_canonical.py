"""Fed-CMP (reconstructed): projectors of clients that interfere are merged; the truth is known.

`python -m benchmarks.bench_canonical [--seeds N] [--clients K] [--markdown | --json]`. Synthetic
and done in seconds: the truth is a projector's change of rank 4, ``(64, 32)``, of norm 1, and the
clients' deltas are made of it in seven ways, most of which a mean is bad at. What it counts is how
far a rule's delta lies from the truth, next to the weighted mean's, seed by seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from petalfl.model import Artifact, Artifacts, Block, Parameter, Tensor
from petalfl.payloads import plain_delta
from petalfl.vectors import Vector
from server.aggregators import parse_aggregator
from server.optimizers import OptimizerState, parse_optimizer, step
from server.reducer.rules.bases import leading_directions

ROWS, COLUMNS, RANK = 64, 32, 4
Array: TypeAlias = NDArray[np.float64]
Rng: TypeAlias = np.random.Generator
Maker: TypeAlias = Callable[[Rng, int, float], tuple[Array, Array]]

RULES = ("weighted-mean", "canonical", "canonical:0.1", "canonical:inf", "by magnitude",
         "geometric-median")  # fmt: skip
BASELINE = RULES[0]
# (aggregator, server optimizer) of the federations that are trained round by round.
STRATEGIES = (
    ("weighted-mean", "sgd"),
    ("weighted-mean", "momentum:0.9:0.1"),
    ("weighted-mean", "orthogonal:0.5"),
    ("weighted-mean", "orthogonal:0.9:0.7"),
    ("canonical", "sgd"),
    ("canonical", "momentum:0.9:0.1"),
    ("canonical", "orthogonal:0.5"),
    ("canonical", "orthogonal:0.9:0.7"),
)
NOTES = """\
Ratios: the rule's distance from the truth over the weighted mean's on the same deltas, median and
p10-p90 over the seeds; under 1 is better. Mean's error: its distance from the truth, whose norm is
1 (median). canonical is canonical:0.5:0.99; canonical:inf has its basis and no reliabilities; "by
magnitude" is canonical with the consensus C = sum p_k C_k, not votes of length 1."""
ROUND_NOTES = """\
Error: the distance of the projector from the truth after the rounds, whose norm is 1 and which it
begins with; median and p10-p90 over the seeds. Ratio: to the first line, seed by seed. Swing: the
mean length of a round's step over the last half of the rounds, in thousandths."""


@dataclass(frozen=True, slots=True)
class Row:
    """One rule on one way of making deltas.

    Attributes:
        strength: What it measures is said by the scenario.
        ratio: Median over the seeds, as are ``mean_error`` and ``merge_s``; p10 and p90 its spread.
        better: Share of seeds in which the rule was nearer to the truth than the mean.
        merge_s: Time to aggregate all clients.
    """

    scenario: str
    strength: float
    rule: str
    ratio: float
    p10: float
    p90: float
    better: float
    mean_error: float
    merge_s: float
    num_seeds: int


@dataclass(frozen=True, slots=True)
class RoundsRow:
    """One strategy that trained a projector round by round; see `ROUND_NOTES`."""

    aggregator: str
    optimizer: str
    error: float
    p10: float
    p90: float
    ratio: float
    swing: float
    num_seeds: int


# Ways of making deltas: (rng, clients, strength) to the truth and the deltas (clients, m, n).


def _noise(rng: Rng, shape: tuple[int, ...]) -> Array:
    """Of norm 1 on average, per matrix."""
    return np.asarray(rng.normal(size=(*shape, ROWS, COLUMNS)) / np.sqrt(ROWS * COLUMNS))


def _low_rank(rng: Rng, rank: int) -> Array:
    """A matrix of norm 1."""
    product = rng.normal(size=(ROWS, rank)) @ rng.normal(size=(rank, COLUMNS))
    return np.asarray(product / np.linalg.norm(product))


def _agree(rng: Rng, num_clients: int, strength: float) -> tuple[Array, Array]:
    truth = _low_rank(rng, RANK)
    return truth, truth + strength * _noise(rng, (num_clients,))


def _one_noisy(rng: Rng, num_clients: int, strength: float) -> tuple[Array, Array]:
    truth, deltas = _agree(rng, num_clients, 0.1)
    deltas[0] += strength * _noise(rng, ())
    return truth, deltas


def _interfere(rng: Rng, num_clients: int, strength: float) -> tuple[Array, Array]:
    truth, deltas = _agree(rng, num_clients, 0.1)
    return truth, deltas + strength * np.stack([_low_rank(rng, 1) for _ in deltas])


def _conflict(rng: Rng, num_clients: int, strength: float) -> tuple[Array, Array]:
    truth = _low_rank(rng, RANK)
    signs = np.where(np.arange(num_clients) < round(strength * num_clients), -1.0, 1.0)
    return truth, signs[:, None, None] * truth + 0.3 * _noise(rng, (num_clients,))


def _overlap(rng: Rng, num_clients: int, strength: float) -> tuple[Array, Array]:
    """What interferes lies in the truth's own directions."""
    truth, deltas = _agree(rng, num_clients, 0.1)
    left, _, right = np.linalg.svd(truth, full_matrices=False)
    mixes = rng.normal(size=(num_clients, RANK, RANK)) * strength / RANK
    return truth, deltas + left[:, :RANK] @ mixes @ right[:RANK]


def _columns(rng: Rng, num_clients: int, strength: float) -> tuple[Array, Array]:
    truth, deltas = _agree(rng, num_clients, 0.0)
    seen = rng.random((num_clients, 1, COLUMNS)) < strength
    return truth, deltas * seen + 0.1 * _noise(rng, (num_clients,))


def _parts(rng: Rng, num_clients: int, strength: float) -> tuple[Array, Array]:
    parts = np.stack([_low_rank(rng, 1) for _ in range(num_clients)])
    parts /= np.linalg.norm(parts.sum(axis=0))
    return parts.sum(axis=0), parts + strength * _noise(rng, (num_clients,)) / num_clients


SCENARIOS: dict[str, tuple[str, Maker, tuple[float, ...]]] = {
    "interfere": ("each adds a direction of its own, of that norm", _interfere, (0.5, 1, 2, 4)),
    "overlap": ("each mixes the truth's directions, by that much", _overlap, (0.5, 1, 2)),
    "conflict": ("that share of the clients pulls the other way", _conflict, (0.1, 0.2, 0.3, 0.4)),
    "one noisy": ("one client has noise of that norm", _one_noisy, (1, 3, 10)),
    "columns": ("each sees that share of the input features", _columns, (0.25, 0.5, 0.75)),
    "agree": ("all are right but for noise of that norm", _agree, (0.1, 0.3, 1, 3)),
    "parts": ("the truth is the sum of what each alone knows; noise", _parts, (0.1, 0.3)),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    options = _parser().parse_args(arguments)
    rows: list[Row] = []
    for name in options.scenarios:
        for strength in SCENARIOS[name][2]:
            _say(f"{name} {strength:g}: {options.seeds} seeds")
            rows += measure(name, strength, options.clients, options.seeds)
    rounds_rows = train_all(options.clients, options.rounds, options.seeds)
    if options.json:
        for line in rows:
            print(json.dumps(dataclasses.asdict(line)))
        for rounds_line in rounds_rows:
            print(json.dumps(dataclasses.asdict(rounds_line)))
        return 0
    head = f"{options.clients} clients, {options.seeds} seeds, {ROWS} x {COLUMNS}, rank {RANK}."
    legend = "\n".join(f"- {name}: {SCENARIOS[name][0]}" for name in options.scenarios)
    blocks = [report(rows, is_markdown=options.markdown), NOTES, head, legend]
    if rounds_rows:
        title = f"{options.rounds} rounds of one-pass training"
        blocks += [title, report_rounds(rounds_rows, is_markdown=options.markdown), ROUND_NOTES]
    print("\n\n".join(blocks))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_canonical",
        description="How near merged deltas come to a known truth, next to the weighted mean.",
    )
    parser.add_argument("--scenarios", type=_names, default=[*SCENARIOS],
                        help=f"of {','.join(SCENARIOS)}; default all")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="default 20")
    parser.add_argument("--clients", type=int, default=10, metavar="K", help="default 10")
    parser.add_argument("--rounds", type=int, default=40, metavar="N",
                        help="of training with server optimizers, default 40; 0: none")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of tables")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SCENARIOS:
            raise argparse.ArgumentTypeError(f"{name!r}: choose of {', '.join(SCENARIOS)}")
    return names


def measure(scenario: str, strength: float, num_clients: int, num_seeds: int) -> list[Row]:
    """A row for each rule but the mean."""
    maker = SCENARIOS[scenario][1]
    errors: dict[str, list[float]] = {rule: [] for rule in RULES}
    times: dict[str, list[float]] = {rule: [] for rule in RULES}
    for seed in range(num_seeds):
        truth, deltas = maker(np.random.default_rng(seed), num_clients, strength)
        vectors = [delta.astype(np.float32).ravel() for delta in deltas]
        for rule in RULES:
            start_s = time.perf_counter()
            merged = merge(rule, vectors)
            times[rule].append(time.perf_counter() - start_s)
            errors[rule].append(float(np.linalg.norm(merged - truth.ravel())))
    means = np.array(errors[BASELINE])
    rows = []
    for rule in RULES[1:]:
        ratios = np.array(errors[rule]) / means
        p10, ratio, p90 = (float(q) for q in np.quantile(ratios, (0.1, 0.5, 0.9)))
        better, merge_s = float((ratios < 1).mean()), float(np.median(times[rule]))
        rows.append(Row(scenario, strength, rule, ratio, p10, p90, better,
                        float(np.median(means)), merge_s, num_seeds))  # fmt: skip
    return rows


def merge(rule: str, deltas: Sequence[Vector]) -> Vector:
    """The delta of all, equally weighted."""
    if rule == "by magnitude":
        return _merge_by_magnitude(deltas)
    aggregator = parse_aggregator(rule)
    state = aggregator.init(BLOCK)
    for delta in deltas:
        state = aggregator.accumulate(state, plain_delta(delta), 1.0)
    merged = aggregator.finalize(state)
    assert merged is not None  # there are deltas
    return merged


def _merge_by_magnitude(deltas: Sequence[Vector]) -> Vector:
    matrices = np.stack(deltas).reshape(-1, ROWS, COLUMNS).astype(np.float64)
    basis = leading_directions(np.einsum("kmn,kln->ml", matrices, matrices), 0.99)
    coefficients = basis.T @ matrices
    consensus = coefficients.mean(axis=0)
    norms = np.linalg.norm(coefficients, axis=2) * np.linalg.norm(consensus, axis=1)
    scores = np.exp(np.einsum("krn,rn->kr", coefficients, consensus) / norms / 0.5)
    fused = np.einsum("kr,krn->rn", scores / scores.sum(axis=0), coefficients)
    return np.asarray((basis @ fused).ravel(), np.float32)


def matrix_block(num_rows: int, num_columns: int) -> Block:
    """A block of one matrix and no graphs."""
    none, size = Artifact("none", "0" * 64, 0), num_rows * num_columns
    return Block(
        name="projector", kind="encoder", inputs=("image",),
        outputs=(Tensor("projector", (num_rows,)),), size=size, num_trainable=size,
        parameters=(Parameter("weight", (num_rows, num_columns)),), statistics=(), dropouts=(),
        task=None, is_frozen=False, state_prefix="", min_batch=1, num_flops=0, activation_bytes=0,
        artifacts=Artifacts(none, None, None, none),
    )  # fmt: skip


BLOCK = matrix_block(ROWS, COLUMNS)


def train_all(num_clients: int, num_rounds: int, num_seeds: int) -> list[RoundsRow]:
    """A row for each of the strategies; none without rounds."""
    if not num_rounds:
        return []
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for strategy in STRATEGIES:
        _say(f"{num_rounds} rounds with {' and '.join(strategy)}: {num_seeds} seeds")
        found[strategy] = [
            train(strategy, np.random.default_rng(seed), num_clients, num_rounds)
            for seed in range(num_seeds)
        ]
    first = np.array(found[STRATEGIES[0]])[:, 0]
    rows = []
    for (aggregator, optimizer), pairs in found.items():
        errors, swings = np.array(pairs).T
        p10, error, p90 = (float(q) for q in np.quantile(errors, (0.1, 0.5, 0.9)))
        ratio, swing = float(np.median(errors / first)), float(np.median(swings))
        rows.append(RoundsRow(aggregator, optimizer, error, p10, p90, ratio, swing, num_seeds))
    return rows


def train(
    strategy: tuple[str, str], rng: Rng, num_clients: int, num_rounds: int
) -> tuple[float, float]:
    """One-pass federated SGD of a linear projector; its last error, and the swing.

    A client sees its own mixture of the features, and its targets are those of the truth and of a
    direction of its own, with noise; no example is seen twice.
    """
    truth = _low_rank(rng, RANK)
    own = truth + np.stack([_low_rank(rng, 1) for _ in range(num_clients)])
    scales = rng.uniform(0.3, 1.5, size=(num_clients, 1, COLUMNS))
    optimizer = parse_optimizer(strategy[1])
    parameters = np.zeros(ROWS * COLUMNS, np.float32)
    state: OptimizerState = {}
    steps = []
    for _ in range(num_rounds):
        start = parameters.reshape(ROWS, COLUMNS).astype(np.float64)
        weights = np.repeat(start[None], num_clients, axis=0)
        for _ in range(5):  # local steps, of 8 examples each
            inputs = rng.normal(size=(num_clients, 8, COLUMNS)) * scales
            noise = 0.1 * rng.normal(size=(num_clients, 8, ROWS))
            errors = inputs @ (weights - own).transpose(0, 2, 1) - noise
            weights = weights - 0.05 * errors.transpose(0, 2, 1) @ inputs / 8
        deltas = [(one - start).astype(np.float32).ravel() for one in weights]
        before = parameters
        parameters, state = step(optimizer, BLOCK, before, merge(strategy[0], deltas), state)
        steps.append(float(np.linalg.norm(parameters - before)))
    swing = float(np.mean(steps[num_rounds // 2 :]))
    return float(np.linalg.norm(parameters - truth.ravel())), swing


def report(rows: Sequence[Row], *, is_markdown: bool) -> str:
    """The table of the merged deltas: a line for each way of making them."""
    lines: dict[tuple[str, float], list[str]] = {}
    for r in rows:
        start = [r.scenario, f"{r.strength:g}", f"{r.mean_error:.3f}"]
        cells = lines.setdefault((r.scenario, r.strength), start)
        cells.append(f"{r.ratio:.2f} ({r.p10:.2f}-{r.p90:.2f})")
    header = ["scenario", "strength", "mean's error", *RULES[1:]]
    return table([header, *lines.values()], is_markdown)


def report_rounds(rows: Sequence[RoundsRow], *, is_markdown: bool) -> str:
    """The table of the trained projectors."""
    header = ("aggregator", "server optimizer", "error", "p10-p90", "ratio", "swing")
    cells = [
        (r.aggregator, r.optimizer, f"{r.error:.3f}", f"{r.p10:.3f}-{r.p90:.3f}",
         f"{r.ratio:.2f}", f"{1e3 * r.swing:.1f}")
        for r in rows
    ]  # fmt: skip
    return table([header, *cells], is_markdown)


def table(cells: Sequence[Sequence[str]], is_markdown: bool) -> str:
    """Lines of cells, the header first, as text or Markdown."""
    if is_markdown:
        lines = [f"| {' | '.join(line)} |" for line in cells]
        return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
