"""Traces of small functions: what their sizes become, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from export.program import BATCH, Op, Program, Ref, Size, trace
from export.rewrites import UnsupportedError

LENGTH = Size(((1, (BATCH,)),))
TIME = Size(((1, ("time",)),))

Function = Callable[..., dict[str, Tensor]]


def traced(function: Function, *shape: int) -> Program:
    """Of ``x``, float32 ``(b, *shape)``."""
    return trace(function, lambda lengths: {"x": torch.zeros(lengths[BATCH], *shape)}, {})


def traced_in_time(function: Function, times: tuple[int, int] = (7, 14)) -> Program:
    """Of ``x``, float32 ``(b, time, 4)``."""
    return trace(
        function,
        lambda lengths: {"x": torch.zeros(lengths[BATCH], lengths["time"], 4)},
        {"time": times},
    )


def targets(program: Program) -> list[str]:
    return [op.target.split(".")[1] for op in program.ops]


def made_by(program: Program, output: str) -> Op:
    (op,) = [op for op in program.ops if op.name == program.outputs[output]]
    return op


# --- sizes ---


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda x: x, (LENGTH, 4)),
        (lambda x: x.repeat(3, 1), (Size(((3, (BATCH,)),)), 4)),
        (lambda x: torch.cat([x, x.new_ones(2, 4)]), (Size(((2, ()), (1, (BATCH,)))), 4)),
        (lambda x: torch.cat([x, x])[1:], (Size(((-1, ()), (2, (BATCH,)))), 4)),
        (lambda x: x.reshape(-1), (Size(((4, (BATCH,)),)),)),
        (lambda x: x.sum(0), (4,)),
        (lambda x: x[:3], (3, 4)),
    ],
)
def test_a_size_is_linear_in_the_batch(
    make: Callable[[Tensor], Tensor], expected: tuple[int | Size, ...]
) -> None:
    program = traced(lambda x: {"y": make(x) + 1}, 4)
    assert program.inputs["x"].shape == (LENGTH, 4)
    assert made_by(program, "y").shape == expected


def test_a_size_may_be_a_product_with_another_axis() -> None:
    program = traced_in_time(lambda x: {"y": x.reshape(-1, 4) * 2, "z": x.mean((1, 2))})
    assert program.inputs["x"].shape == (LENGTH, TIME, 4)
    assert made_by(program, "y").shape == (Size(((1, (BATCH, "time")),)), 4)
    program = traced_in_time(lambda x: {"y": x.sum() / x.numel() + x.shape[0] + 2 * x.shape[1]})
    sizes = [a for op in program.ops for a in op.arguments if isinstance(a, Size)]
    assert sizes == [
        Size(((4, (BATCH, "time")),)), LENGTH, Size(((2, ("time",)),)),
    ]  # fmt: skip


def test_a_size_at_given_lengths() -> None:
    size = Size(((-1, ()), (2, (BATCH,)), (3, (BATCH, "time"))))
    assert size.at({BATCH: 5, "time": 7}) == -1 + 2 * 5 + 3 * 5 * 7
    assert Size(()).at({}) == 0


def test_numbers_that_depend_on_the_batch_are_sizes() -> None:
    program = traced(lambda x: {"y": x / len(x)}, 4)
    (op,) = program.ops
    assert (op.target, op.arguments) == ("aten.div.Tensor", (Ref("x"), LENGTH))


def test_equal_numbers_of_other_types_are_no_constants() -> None:
    """1, 1.0 and True are equal in Python."""
    program = traced(lambda x: {"y": x * 1.0, "z": x * 1}, 4)
    assert [type(op.arguments[1]) for op in program.ops] == [float, int]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: {"y": x * len(x) ** 0.5}, "a number depends on the length of batch otherwise"),
        (lambda x: {"y": x * (1 / len(x))}, "a number depends on the length of batch otherwise"),
        (lambda x: {"y": x[: len(x) // 2]}, "a number depends on the length of batch otherwise"),
        (
            lambda x: {"y": x + 1 if len(x) > 62 else (x + 1) * 2},
            "the number of operations depends on the length of the batch",
        ),
        (
            lambda x: {"y": x + 1 if len(x) > 62 else x * 2},
            r"which operator runs depends on a length: aten\.",
        ),
        (
            lambda x: {"y": x.sum(0, keepdim=len(x) > 62)},
            "number of arguments depends on a length|an argument depends on a length",
        ),
        (
            lambda x: {"y": x + torch.tensor([float(len(x))])},
            "a constant table depends on a length that may vary",
        ),
        (
            lambda x: {"y": torch.cat([x] * (len(x) - 59))},
            "the number of arguments depends on a length",
        ),
    ],
)
def test_what_no_sum_of_products_gives_is_refused(function: Function, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        traced(function, 4)


def test_the_message_names_the_axes() -> None:
    def unrolled(x: Tensor) -> dict[str, Tensor]:
        total = x[:, 0]
        for t in range(x.shape[1]):
            total = total * 2 + x[:, t]
        return {"y": total}

    with pytest.raises(UnsupportedError, match="operations depends on the length of time"):
        traced_in_time(unrolled)


@pytest.mark.parametrize("times", [(4, 8), (61, 67), (1, 2)])
def test_an_axis_as_long_as_another(times: tuple[int, int]) -> None:
    """Which axis a length comes from is told by its changing, not by its value."""
    program = traced_in_time(lambda x: {"y": x.transpose(0, 1) + 1}, times)
    assert made_by(program, "y").shape == (TIME, LENGTH, 4)


def test_a_fixed_axis_as_long_as_the_traced_batches() -> None:
    program = traced(lambda x: {"y": x.transpose(1, 2) + 1}, 61, 67)
    assert made_by(program, "y").shape == (LENGTH, 67, 61)


# --- the code ---


def test_constants_are_kept_by_value() -> None:
    table = torch.tensor([1.0, 2.0, 3.0, 4.0])
    program = traced(lambda x: {"y": x * table}, 4)
    ((name, value),) = program.constants.items()
    assert value.tolist() == table.tolist()
    assert name in program.ops[-1].refs()


def test_what_occurs_twice_is_computed_once() -> None:
    def function(x: Tensor) -> dict[str, Tensor]:
        return {"y": torch.tanh(x + 1) * torch.tanh(x + 1), "z": torch.tanh(x + 1), "w": x + 2}

    program = traced(function, 4)
    assert sorted(targets(program)) == ["add", "add", "mul", "tanh"]
    product = made_by(program, "y")
    assert product.arguments[0] == product.arguments[1] == Ref(program.outputs["z"])


def test_what_differs_in_an_argument_alone_is_computed_twice() -> None:
    program = traced(lambda x: {"y": x.sum(1), "z": x.sum(1, keepdim=True), "w": x.sum(0)}, 4)
    assert targets(program) == ["sum"] * 3


def test_dead_code_is_dropped() -> None:
    def function(x: Tensor, unused: Tensor) -> dict[str, Tensor]:
        torch.exp(x) + unused
        return {"y": x.tanh(), "same": x}

    program = trace(
        function, lambda lengths: {n: torch.zeros(lengths[BATCH]) for n in ("x", "unused")}, {}
    )
    assert targets(program) == ["tanh"]
    assert program.inputs.keys() == {"x"}
    assert program.outputs["same"] == "x"


def test_copies_are_nothing() -> None:
    program = traced(lambda x: {"y": x.clone().detach().contiguous().tanh()}, 4)
    assert targets(program) == ["tanh"]
    assert program.ops[0].arguments == (Ref("x"),)


def test_gradients_are_traced() -> None:
    def function(x: Tensor, w: Tensor, g: Tensor) -> dict[str, Tensor]:
        w = w.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(x @ w, w, g)
        return {"gradient": gradient}

    def make_inputs(lengths: dict[str, int]) -> dict[str, Tensor]:
        b = lengths[BATCH]
        return {"x": torch.zeros(b, 4), "w": torch.zeros(4, 2), "g": torch.zeros(b, 2)}

    program = trace(function, make_inputs, {})
    assert program.inputs.keys() == {"x", "g"}  # of a product, the gradient by w needs no w
    assert made_by(program, "gradient").shape == (4, 2)


# --- writing in place ---


def test_a_tensor_that_is_written_as_a_whole_is_a_new_one() -> None:
    def function(x: Tensor) -> dict[str, Tensor]:
        y = x * 2
        y.add_(1).relu_()
        y += x
        return {"y": y}

    program = traced(function, 4)
    assert targets(program) == ["mul", "add_", "relu_", "add_"]
    assert made_by(program, "y").arguments[1] == Ref("x")


def part(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 1.0
    return y


def seen_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    view = y.view(-1, 2, 2)
    y.mul_(3)
    return view


def seen_past_detach(x: Tensor) -> Tensor:
    y = x * 2
    y.detach().mul_(3)
    return y


def filled(x: Tensor) -> Tensor:
    y = x.new_zeros(len(x), 6)
    y[:, :4] = x
    return y


def half(x: Tensor) -> Tensor:
    y = x * 2
    y.chunk(2, 1)[0].exp_()
    return y


def the_other_view(x: Tensor) -> Tensor:
    y = x * 2
    y.t().mul_(3)
    return y


@pytest.mark.parametrize(
    "function", [part, seen_through_a_view, seen_past_detach, filled, half, the_other_view]
)
def test_reading_what_was_written_in_part_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="read after a part of it was written in place"):
        traced(lambda x: {"y": function(x) + 1}, 4)


def diagonal(x: Tensor) -> Tensor:
    y = x * 2
    y.diagonal(dim1=1, dim2=2).mul_(3)
    return y


def test_writing_a_diagonal_is_refused() -> None:
    with pytest.raises(UnsupportedError):
        traced(lambda x: {"y": diagonal(x) + 1}, 3, 3)


@pytest.mark.parametrize("function", [part, seen_past_detach, filled])
def test_returning_what_was_written_in_part_is_refused(
    function: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(UnsupportedError):
        traced(lambda x: {"y": function(x)}, 4)


def test_a_part_that_is_written_and_read_itself() -> None:
    def function(x: Tensor) -> dict[str, Tensor]:
        first = (x * 2)[:, 0]
        first.add_(1)
        return {"y": first.tanh()}

    assert targets(traced(function, 4)) == ["mul", "select", "add_", "tanh"]


# --- cutting ---


def test_a_program_that_is_given_a_value() -> None:
    program = traced(lambda x: {"y": (x + 1).tanh() * x, "z": x.exp()}, 4)
    (tanh,) = [op for op in program.ops if "tanh" in op.target]
    given = {tanh.name: program.inputs["x"]}
    short = program.restricted_to({"y": program.outputs["y"]}, given).renamed({tanh.name: "saved"})
    assert targets(short) == ["mul"]
    assert short.inputs.keys() == {"x", "saved"}
    assert [*short.ops[0].refs()] == ["saved", "x"]
    assert targets(program) == ["add", "tanh", "mul", "exp"], "the whole is as it was"


def test_a_program_that_is_given_its_output() -> None:
    program = traced(lambda x: {"y": x.tanh()}, 4)
    given = {program.outputs["y"]: program.inputs["x"]}
    short = program.restricted_to(program.outputs, given).renamed({program.outputs["y"]: "saved"})
    assert not short.ops
    assert short.inputs.keys() == {"saved"}
    assert short.outputs == {"y": "saved"}
