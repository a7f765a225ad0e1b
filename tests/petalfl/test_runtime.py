from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import onnxruntime
import pytest

from petalfl import runtime
from petalfl.errors import ModelError
from petalfl.runtime import ENGINES, find_runtime

Installed = Callable[..., None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Pretends that these packages are installed, by their metadata."""

    def pretend(**versions: str) -> None:
        by_name = {name.replace("_", "-"): number for name, number in versions.items()}

        def version(package: str) -> str:
            if package not in by_name:
                raise importlib.metadata.PackageNotFoundError(package)
            return by_name[package]

        monkeypatch.setattr(runtime, "version", version)

    return pretend


def test_what_is_really_installed() -> None:
    found = find_runtime()
    assert found.version == onnxruntime.__version__
    assert importlib.metadata.version(found.package) == found.version
    assert found.engine == ("ort-training" if "training" in found.package else "ort")
    assert find_runtime(found.engine) == found
    assert str(found) == f"{found.package} {found.version}"


@pytest.mark.parametrize(
    ("package", "engine", "other", "advice"),
    [
        ("onnxruntime", "ort", "ort-training", "pip install onnxruntime-training-cpu"),
        ("onnxruntime_gpu", "ort", "ort-training", "pip uninstall onnxruntime-gpu"),
        ("onnxruntime_training_cpu", "ort-training", "ort", "pip install onnxruntime$"),
        ("onnxruntime_training", "ort-training", "ort", "pip uninstall onnxruntime-training"),
    ],
)
def test_what_is_installed_decides(
    package: str, engine: Any, other: Any, advice: str, installed: Installed
) -> None:
    installed(**{package: "1.2.3"})
    for wanted in ("auto", engine):
        found = find_runtime(wanted)
        assert (found.engine, found.package) == (engine, package.replace("_", "-"))
    with pytest.raises(
        ModelError, match=f"^engine {other} is asked for, .* is installed.*{advice}"
    ):
        find_runtime(other)


def test_installed_over_each_other(installed: Installed) -> None:
    installed(onnxruntime_training_cpu="1.19.2", onnxruntime="1.31.1")
    for wanted in ENGINES:
        with pytest.raises(
            ModelError,
            match=r"^onnxruntime-training-cpu 1\.19\.2 and onnxruntime 1\.31\.1 are installed over "
            r"each other.*pip uninstall -y onnxruntime-training-cpu onnxruntime && pip install "
            r"petalfl\[ort\]$",
        ):
            find_runtime(wanted)


@pytest.mark.parametrize(
    ("spec", "engine"), [(ModuleType("onnxruntime.training"), "ort-training"), (None, "ort")]
)
def test_a_frozen_app_has_no_metadata(
    spec: Any, engine: str, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed()
    monkeypatch.setattr(runtime, "find_spec", lambda name: spec)
    assert find_runtime().engine == engine


@pytest.mark.parametrize(
    ("version", "is_right"),
    [("1.9.0", False), ("1.18.1", False), ("1.19.0", True), ("1.31.1+cpu", True), ("2.0", True)],
)
def test_versions_that_compute_wrong_gradients(
    version: str, is_right: bool, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(onnxruntime=version)
    monkeypatch.setattr(onnxruntime, "__version__", version)
    if is_right:
        assert find_runtime().version == version
    else:
        with pytest.raises(ModelError, match=f"^onnxruntime {version} computes wrong gradients"):
            find_runtime()


def test_none_is_installed(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"cannot be imported.*pip install petalfl\[ort\]"):
        find_runtime()


def test_what_uninstalling_one_of_two_leaves(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(onnxruntime="1.31.1")
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    with pytest.raises(ModelError, match="incomplete; install it again"):
        find_runtime()


def test_an_engine_that_there_is_none_of() -> None:
    with pytest.raises(ValueError, match="'cuda': expected one of auto, ort-training, ort"):
        find_runtime("cuda")  # type: ignore[arg-type]
