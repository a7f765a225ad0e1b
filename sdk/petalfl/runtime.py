"""Which ONNX Runtime is installed here: any one runs the artifacts, but only one may be there.

Two lines of packages bring the module ``onnxruntime``: onnxruntime-training, whose last version
is 1.19.2, and stock onnxruntime. Both read the same plain-ONNX graphs; what is installed decides.
Installed over each other, they leave a mixture of files.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, TypeAlias

from petalfl.errors import ModelError

EngineName: TypeAlias = Literal["auto", "ort-training", "ort"]
ENGINES: tuple[EngineName, ...] = ("auto", "ort-training", "ort")

TRAINING_PACKAGES = ("onnxruntime-training-cpu", "onnxruntime-training")
STOCK_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
)


OLDEST = (1, 19)  # before, a session's second run computes wrong gradients: docs/runtimes.md


class Runtime(NamedTuple):
    """The ONNX Runtime of this Python environment.

    Attributes:
        engine: ``ort-training`` for the training build, else ``ort``.
        package: As pip knows it.
        version: As the module says.
    """

    engine: EngineName
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


def find_runtime(wanted: EngineName = "auto") -> Runtime:
    """Imports ONNX Runtime and says which one it is.

    Args:
        wanted: ``auto`` takes what is installed; another name insists on that line of packages.

    Raises:
        ModelError: None is installed, one too old to be right, another one than wanted, or two
            over each other.
        ValueError: ``wanted`` is no engine.
    """
    if wanted not in ENGINES:
        raise ValueError(f"engine {wanted!r}: expected one of {', '.join(ENGINES)}")
    runtime = _installed()
    if (found := re.match(r"(\d+)\.(\d+)", runtime.version)) and (
        (int(found[1]), int(found[2])) < OLDEST
    ):
        oldest = ".".join(map(str, OLDEST))
        raise ModelError(
            f"{runtime} computes wrong gradients, as all versions before {oldest} do; install a "
            "newer one with: pip install --upgrade petalfl[ort]"
        )
    if wanted in ("auto", runtime.engine):
        return runtime
    package = TRAINING_PACKAGES[0] if wanted == "ort-training" else STOCK_PACKAGES[0]
    raise ModelError(
        f"engine {wanted} is asked for, {runtime} is installed; engine 'auto' takes it, or: "
        f"pip uninstall {runtime.package} && pip install {package}"
    )


def _installed() -> Runtime:
    onnxruntime = _import()
    training, stock = _versions(TRAINING_PACKAGES), _versions(STOCK_PACKAGES)
    if training and stock:
        found = training | stock
        both = " and ".join(f"{package} {number}" for package, number in found.items())
        raise ModelError(
            f"{both} are installed over each other, for both are the module onnxruntime: "
            f"pip uninstall -y {' '.join(found)} && pip install petalfl[ort]"
        )
    # Where the packages' metadata was left out, as in a frozen app, the module tells its line.
    is_training = bool(training) or (not stock and find_spec("onnxruntime.training") is not None)
    known = training if is_training else stock
    default = TRAINING_PACKAGES if is_training else STOCK_PACKAGES
    return Runtime(
        "ort-training" if is_training else "ort",
        next(iter(known), default[0]),
        str(onnxruntime.__version__),
    )


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(
            f"onnxruntime cannot be imported ({error}); install it with: pip install petalfl[ort]"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):  # what uninstalling one of two leaves
        raise ModelError(
            "the installation of onnxruntime is incomplete; install it again with: "
            "pip install --force-reinstall petalfl[ort]"
        )
    return onnxruntime


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # PackageNotFoundError is one
            continue
    return found


def version(package: str) -> str:
    """As `importlib.metadata.version`, which is imported late: it would slow every start."""
    from importlib import metadata

    return metadata.version(package)
