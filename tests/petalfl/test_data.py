from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from petalfl.data import check_inputs, check_labels, fits
from petalfl.errors import DataError
from petalfl.model import Block, Modality, ModelManifest, Task
from tests.petalfl.builders import make_block, make_manifest


def manifest_of(*heads: Block) -> ModelManifest:
    modalities = {
        "acc": Modality((3, 4)), "hr": Modality((2,)), "temp": Modality(()),
        "words": Modality((None,), "int64", 100, ((1, 64),)),
        "image": Modality((1, None, None), ranges=((1, 64), (1, 64))),
        "place": Modality((), "int64", 5),
    }  # fmt: skip
    encoders = [make_block(f"encoder-{name}", (name,), 1, 1) for name in modalities]
    return make_manifest(modalities, *encoders, *heads)


def head(name: str, task: Task, width: int = 3) -> Block:
    inputs = tuple(f"encoder-{m}" for m in ("acc", "hr", "temp", "words", "image", "place"))
    return make_block(name, inputs, width, 6, task=task)


MANIFEST = manifest_of(head("head", Task("cross_entropy")))
SEVERAL = manifest_of(
    head("head-kind", Task("cross_entropy")), head("head-tags", Task("bce_with_logits")),
    head("head-pace", Task("mse"), 2), head("head-angle", Task("l1"), 1),
)  # fmt: skip
MODALITIES = "acc, hr, image, place, temp, words"  # sorted by the manifest's JSON


def acc(n: int = 2, dtype: str = "f4") -> Any:
    return np.arange(12 * n).reshape(n, 3, 4).astype(dtype)


def with_value(value: float) -> Any:
    array = acc(3)
    array[1, 2, 3] = value
    return array


GOOD_INPUTS = {
    "float32": acc(),
    "float64": acc(dtype="f8"),
    "float16": acc(dtype="f2"),
    "integers": acc(dtype="i2"),
    "unsigned": acc(dtype="u1"),
    "big-endian": acc(dtype=">f4"),
    "nested lists": acc().tolist(),
    "Fortran order": np.asfortranarray(acc()),
    "strided": acc(4)[::2] * 0 + acc(),
    "transposed": np.ascontiguousarray(acc().transpose(0, 2, 1)).transpose(0, 2, 1),
    "reversed": acc()[::-1].copy()[::-1],
    "read-only": np.frombuffer(acc().tobytes(), "f4").reshape(2, 3, 4),
}


@pytest.mark.parametrize("array", GOOD_INPUTS.values(), ids=GOOD_INPUTS.keys())
def test_good_inputs_become_contiguous_float32(array: Any) -> None:
    found = check_inputs(MANIFEST, {"acc": array})["acc"]
    assert found.dtype == np.float32
    assert found.dtype.isnative
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, acc())


def test_all_modalities_or_some() -> None:
    given = {"acc": acc(5), "hr": np.zeros((5, 2)), "temp": np.zeros(5)}
    shapes = {name: array.shape for name, array in check_inputs(MANIFEST, given).items()}
    assert shapes == {"acc": (5, 3, 4), "hr": (5, 2), "temp": (5,)}
    assert list(check_inputs(MANIFEST, {"hr": given["hr"]})) == ["hr"]


def test_the_app_keeps_its_arrays() -> None:
    given = acc(dtype="f8")
    check_inputs(MANIFEST, {"acc": given})[("acc")][:] = -1
    np.testing.assert_array_equal(given, acc())


BAD_INPUTS = {
    "none": ({}, f"no modality was given, the model has {MODALITIES}"),
    "unknown": ({"eeg": acc()}, f"unknown modality 'eeg', the model has {MODALITIES}"),
    "one unknown": ({"acc": acc(), "": acc()}, "unknown modality ''"),
    "one example": ({"acc": acc()[0]}, r"acc: found shape \(3, 4\), expected \(n, 3, 4\)"),
    "channels last": ({"acc": np.zeros((2, 4, 3))}, r"acc: found shape \(2, 4, 3\)"),
    "too short": ({"acc": np.zeros((2, 3, 3))}, r"acc: found shape \(2, 3, 3\)"),
    "one dimension more": ({"acc": acc()[None]}, r"found shape \(1, 2, 3, 4\)"),
    "flat": ({"hr": np.zeros(2)}, r"hr: found shape \(2,\), expected \(n, 2\)"),
    "a number": ({"temp": 1.0}, r"temp: found shape \(\), expected \(n\)"),
    "object": ({"acc": acc().astype(object)}, "acc: found object, expected numbers"),
    "None": ({"acc": [[[None] * 4] * 3] * 2}, "acc: found object, expected numbers"),
    "strings": ({"acc": acc().astype(str)}, "acc: found <U.*, expected numbers"),
    "bytes": ({"acc": acc().astype("S")}, r"acc: found \|S.*, expected numbers"),
    "complex": ({"acc": acc(dtype="c8")}, "acc: found complex64, expected numbers"),
    "bool": ({"acc": acc(dtype="?")}, "acc: found bool, expected numbers"),
    "dates": ({"acc": acc(dtype="M8[s]")}, r"acc: found datetime64\[s\], expected numbers"),
    "NaN": ({"acc": with_value(np.nan)}, "acc: example 1 holds NaN or infinity"),
    "infinity": ({"acc": with_value(-np.inf)}, "acc: example 1 holds NaN or infinity"),
    "NaN in 1-D": ({"temp": [0, 1, np.nan]}, "temp: example 2 holds NaN or infinity"),
    "empty": ({"acc": acc(0)}, r"at least 1, found \{'acc': 0\}"),
    "one empty": ({"acc": acc(), "hr": np.zeros((0, 2))}, r"found \{'acc': 2, 'hr': 0\}"),
    "unequal": ({"acc": acc(2), "hr": np.zeros((3, 2))}, r"found \{'acc': 2, 'hr': 3\}"),
    "words of floats": ({"words": np.zeros((2, 3))}, "words: found float64, expected integers"),
    "words of bools": ({"words": np.zeros((2, 3), bool)}, "words: found bool, expected integers"),
    "a word too many": ({"words": [[0, 100]]}, "words: found 0 to 100, expected 0 to 99"),
    "a negative word": ({"words": [[-1, 5]]}, "words: found -1 to 5, expected 0 to 99"),
    "a word beyond int64": (
        {"words": np.array([[2**63]], np.uint64)}, "words: found 9223372036854775808 to .* to 99"
    ),
    "no words": ({"words": np.zeros((2, 0), np.int64)},
                 r"words: found shape \(2, 0\), expected \(n, any\)"),
    "words by sentence": ({"words": np.zeros((2, 3, 4), np.int64)}, r"expected \(n, any\)"),
    "no image": ({"image": np.zeros((2, 3, 4, 4))}, r"image: .* expected \(n, 1, any, any\)"),
    "no place": ({"place": 3}, r"place: found shape \(\), expected \(n\)"),
}  # fmt: skip


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_inputs(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_inputs(MANIFEST, inputs)


INTEGERS = {
    "int64": np.array([[0, 99], [5, 7]]),
    "uint8": np.array([[0, 99], [5, 7]], np.uint8),
    "big-endian": np.array([[0, 99], [5, 7]], ">i4"),
    "lists": [[0, 99], [5, 7]],
    "strided": np.array([[0, 1, 99], [5, 1, 7]])[:, ::2],
}


@pytest.mark.parametrize("words", INTEGERS.values(), ids=INTEGERS.keys())
def test_integers_become_contiguous_int64(words: Any) -> None:
    found = check_inputs(MANIFEST, {"words": words})["words"]
    assert found.dtype == np.int64
    assert found.flags.c_contiguous
    assert found.tolist() == [[0, 99], [5, 7]]


def test_axes_that_vary() -> None:
    for width in (1, 2, 50):
        given = {"words": np.zeros((2, width), np.int64), "image": np.zeros((2, 1, width, 3))}
        assert check_inputs(MANIFEST, given)["image"].shape == (2, 1, width, 3)


FITS = [
    ((), (), True), ((3,), (3,), True), ((3,), (None,), True), ((0,), (None,), False),
    ((3,), (4,), False), ((3,), (), False), ((), (None,), False), ((1, 2), (None, 2), True),
    ((1, 2), (None, 3), False), ((1, 2), (None,), False),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "expected", "is_fit"), FITS)
def test_fits(shape: tuple[int, ...], expected: tuple[int | None, ...], is_fit: bool) -> None:
    assert fits(shape, expected) is is_fit


def test_ragged_lists() -> None:
    with pytest.raises(DataError, match="acc"):
        check_inputs(MANIFEST, {"acc": [[[1.0] * 4] * 3, [[1.0] * 4] * 2]})
    with pytest.raises(DataError, match="labels"):
        check_labels(MANIFEST, [[0], [0, 1]], 2)


def test_a_value_beyond_float32() -> None:
    with pytest.raises(DataError, match="acc: example 1 holds NaN or infinity"):
        check_inputs(MANIFEST, {"acc": acc(2, "f8") * np.array([1, 1e300])[:, None, None]})


GOOD_LABELS = {
    "list": [0, 2, 1],
    "int64": np.array([0, 2, 1]),
    "uint8": np.array([0, 2, 1], np.uint8),
    "int32 strided": np.array([0, 9, 2, 9, 1, 9], np.int32)[::2],
}


@pytest.mark.parametrize("labels", GOOD_LABELS.values(), ids=GOOD_LABELS.keys())
def test_good_labels_become_int64(labels: Any) -> None:
    for given in (labels, {"head": labels}):
        found = check_labels(MANIFEST, given, 3)
        assert found.keys() == {"head"}
        assert found["head"].dtype == np.int64
        assert found["head"].tolist() == [0, 2, 1]


BAD_LABELS = {
    "too high": ([0, 3], "found 0 to 3, expected 0 to 2"),
    "far too high": (np.array([0, 2**64 - 1], np.uint64), "expected 0 to 2"),
    "negative": ([-1, 0], "found -1 to 0, expected 0 to 2"),
    "float": ([0.0, 1.0], r"found float64 \(2,\), expected integers \(2,\)"),
    "bool": ([True, False], r"found bool \(2,\), expected integers"),
    "strings": (["0", "1"], r"found <U1 \(2,\), expected integers"),
    "object": (np.array([0, None]), r"found object \(2,\), expected integers"),
    "one less": ([0], r"found int64 \(1,\), expected integers \(2,\)"),
    "one more": ([0, 1, 2], r"found int64 \(3,\), expected integers \(2,\)"),
    "none": ([], r"found float64 \(0,\), expected integers \(2,\)"),
    "a number": (0, r"found int64 \(\), expected integers \(2,\)"),
    "one-hot": ([[1, 0, 0], [0, 1, 0]], r"found int64 \(2, 3\), expected integers \(2,\)"),
    "column": ([[0], [1]], r"found int64 \(2, 1\), expected integers \(2,\)"),
}


@pytest.mark.parametrize(("labels", "message"), BAD_LABELS.values(), ids=BAD_LABELS.keys())
def test_bad_labels(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"labels: .*{message}"):
        check_labels(MANIFEST, labels, 2)


def test_labels_by_task() -> None:
    """Of some tasks or all, in whatever order."""
    given: dict[str, Any] = {
        "pace": [[1, 2], [3, 4.5]],
        "kind": [0, 2],
        "tags": np.array([[True, False, True], [False, False, True]]),
        "angle": np.array([[-1e3], [1e3]]),
    }
    found = check_labels(SEVERAL, given, 2)
    assert found.keys() == given.keys()
    assert {task: array.dtype for task, array in found.items()} == {
        "pace": np.float32, "kind": np.int64, "tags": np.float32, "angle": np.float32
    }  # fmt: skip
    assert found["tags"].tolist() == [[1, 0, 1], [0, 0, 1]]
    assert found["pace"].tolist() == [[1, 2], [3, 4.5]]
    assert check_labels(SEVERAL, {"kind": [0, 2]}, 2).keys() == {"kind"}


BAD_BY_TASK = {
    "an array": ([0, 1], "labels: expected a mapping by task, of some of kind, tags, pace, angle"),
    "no task": ({}, "labels: found no task, the model has kind, tags, pace, angle"),
    "unknown": ({"mood": [0, 1]}, "labels: unknown task 'mood', the model has kind, tags"),
    "too high": ({"kind": [0, 3]}, "labels of kind: found 0 to 3, expected 0 to 2"),
    "classes for tags": (
        {"tags": [0, 1]}, r"labels of tags: found int64 \(2,\), expected numbers \(2, 3\)"
    ),
    "one too few": ({"pace": [[1, 2]]}, r"labels of pace: .* expected numbers \(2, 2\)"),
    "flat": ({"angle": [1.0, 2.0]}, r"labels of angle: .* expected numbers \(2, 1\)"),
    "tags of 2": ({"tags": [[0, 1, 2], [0, 0, 0]]}, "tags: found 0 to 2, expected 0 to 1"),
    "tags below 0": ({"tags": [[0, 1, -0.5], [0, 0, 0]]}, "tags: found -0.5 to 1, expected 0 to 1"),
    "NaN": ({"pace": [[1, 2], [3, np.nan]]}, "labels of pace: example 1 holds NaN or infinity"),
    "text": ({"pace": [["1", "2"], ["3", "4"]]}, "labels of pace: found <U1, expected numbers"),
    "ragged": ({"pace": [[1, 2], [3]]}, "labels of pace: found no array"),
}  # fmt: skip


@pytest.mark.parametrize(("labels", "message"), BAD_BY_TASK.values(), ids=BAD_BY_TASK.keys())
def test_bad_labels_by_task(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_labels(SEVERAL, labels, 2)
