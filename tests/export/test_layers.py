"""Every kind of layer that is named in docs/layers.md, against PyTorch."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from petalfl.errors import ModelError
from tests.engine_steps import layer_losses
from tests.export import layer_law, layer_page
from tests.export.layer_law import TOLERANCE, Exported, Masked, check, export, named
from tests.export.layer_steps import write_layer
from tests.export.layers import CASES, Case
from tests.stock import TOLERANCE as RUNTIME_TOLERANCE
from tests.stock import StockSteps, largest_difference

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
EXACT = [case for case in CASES if case.refusal is None]
REFUSED = [case for case in CASES if case.refusal is not None]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def title(case: Case) -> str:
    return f"{case.kind}: {case.configuration}"


def by_title(wanted: str) -> Case:
    (case,) = [case for case in CASES if title(case) == wanted]
    return case


class Graphs(NamedTuple):
    """A case's, exported once for all that is asked of it."""

    case: Case
    exported: Exported


@pytest.fixture(scope="module", params=EXACT, ids=title)
def graphs(request: pytest.FixtureRequest) -> Graphs:
    return Graphs(request.param, export(request.param))


def test_the_law(graphs: Graphs) -> None:
    errors = check(*graphs)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


def test_both_runtimes_train_alike(graphs: Graphs, stock_steps: StockSteps, tmp_path: Path) -> None:
    write_layer(*graphs, tmp_path)
    found, expected = stock_steps.losses(tmp_path), layer_losses(tmp_path)
    assert largest_difference(found, expected) <= RUNTIME_TOLERANCE


def test_a_difference_is_found(stock_steps: StockSteps, tmp_path: Path) -> None:
    case = by_title("Linear: (b, c)")
    write_layer(case, export(case), tmp_path)
    expected = layer_losses(tmp_path)
    with np.load(tmp_path / "arrays.npz") as file:
        arrays = dict(file)
    arrays["parameters"] *= np.float32(1.001)
    np.savez(tmp_path / "arrays.npz", **arrays)
    assert largest_difference(stock_steps.losses(tmp_path), expected) > RUNTIME_TOLERANCE


@pytest.mark.parametrize("result", ["block", "gradient", "d_x", "statistics"])
def test_a_wrong_result_is_found(result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = by_title("BatchNorm1d: after Conv1d")
    right = Exported.training_step

    def wrong(*args: Any) -> Any:
        found = right(*args)
        return found | {result: found[result] * np.float32(1 + 3e-5)}

    monkeypatch.setattr(Exported, "training_step", wrong)
    assert max(check(case, export(case)).values()) > TOLERANCE


@pytest.mark.parametrize("case", REFUSED, ids=title)
def test_refused_by_name(case: Case) -> None:
    assert case.refusal is not None
    with pytest.raises(ModelError, match=case.refusal):
        export(case)


def test_the_page_is_current() -> None:
    rows = layer_page.table(PAGE.read_text())
    assert [row[:3] for row in rows] == [
        (case.kind, case.configuration, "exact" if case.refusal is None else "refused")
        for case in CASES
    ]
    for case, row in zip(CASES, rows, strict=True):
        if case.refusal is None:
            assert float(row.note) <= TOLERANCE, title(case)
            assert float(row.apart) <= RUNTIME_TOLERANCE, title(case)
        else:
            assert re.search(case.refusal, row.note), title(case)


def test_titles_are_distinct() -> None:
    assert len({title(case) for case in CASES}) == len(CASES)


JUDGED = [
    case
    for case in EXACT
    if re.search("(?i)dropout|attention|transformer", title(case))
    and "BatchNorm" not in title(case)
]


@pytest.mark.parametrize("case", JUDGED, ids=title)
def test_the_judge(case: Case) -> None:
    """With masks of 1, the reference is PyTorch's own pass without dropout."""
    module, inputs = case.module(), case.inputs(3)
    without = copy.deepcopy(module)
    for layer in without.modules():
        for attribute in ("p", "dropout"):
            if isinstance(getattr(layer, attribute, None), float):
                setattr(layer, attribute, 0.0)
    without.eval()
    with Masked([torch.ones(())] * 9):
        found = named("block", module(*inputs.values()))
    for name, expected in named("block", without(*inputs.values())).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-6)


def test_masks_fit_their_inputs() -> None:
    mask = torch.randn(3, 6, 4)
    assert torch.equal(layer_law.fitted(mask, torch.Size((3, 6, 4))), mask)
    assert torch.equal(layer_law.fitted(mask, torch.Size((6, 3, 4))), mask.transpose(0, 1))
    assert torch.equal(layer_law.fitted(mask, torch.Size((18, 4))), mask.flatten(0, 1))
    channels = torch.randn(3, 6, 1)
    assert torch.equal(layer_law.fitted(channels, torch.Size((3, 6, 4))), channels)
    assert layer_law.fitted(channels[..., 0], torch.Size((3, 6, 4))).shape == (3, 6, 1)
