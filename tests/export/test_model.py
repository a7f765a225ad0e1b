from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export.model import BlockModel, TaskSpec, flatten, unflatten
from petalfl.errors import ModelError


class Call(nn.Module):
    """A module given as a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class Join(nn.Module):
    """A weighted sum of embeddings that records how it was called."""

    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d))
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, embeddings: Mapping[str, Tensor], *present: Tensor) -> Tensor:
        self.calls.append((dict(embeddings), *present))
        return self.scale * torch.stack(list(embeddings.values())).sum(0)


RNG = torch.Generator().manual_seed(0)
EXAMPLES = {"a": torch.randn(3, 5, generator=RNG), "b": torch.randn(3, 6, generator=RNG)}


def build(**changes: Any) -> BlockModel:
    """Modalities a and b, 4 wide, fused; one head of three classes."""
    options: dict[str, Any] = {
        "name": "m",
        "encoders": {"a": nn.Linear(5, 4), "b": nn.Linear(6, 4)},
        "fusion": Join(),
        "head": nn.Linear(4, 3),
        "examples": EXAMPLES,
    }
    return BlockModel(**{**options, **changes})


def last_call(model: BlockModel) -> tuple[Any, ...]:
    assert isinstance(model.fusion, Join)
    return model.fusion.calls[-1]


def staged(**changes: Any) -> BlockModel:
    """One encoder of two stages, the first frozen; two tasks, no fusion."""
    options: dict[str, Any] = {
        "name": "m",
        "encoders": {"a": {"backbone": nn.Linear(5, 6), "neck": nn.Linear(6, 4)}},
        "head": {"kind": nn.Linear(4, 3), "size": nn.Linear(4, 1)},
        "examples": {"a": EXAMPLES["a"]},
        "loss": {"kind": "cross_entropy", "size": "mse"},
        "loss_weights": {"size": 0.5},
        "class_names": {"kind": ("x", "y", "z")},
        "frozen_blocks": ["backbone-a"],
    }
    return BlockModel(**{**options, **changes})


# --- the blocks ---


def test_the_blocks_of_a_plain_model() -> None:
    model = build()
    found = [(b.name, b.kind, b.inputs, b.modalities, b.takes_present) for b in model.blocks()]
    assert found == [
        ("encoder-a", "encoder", ("a",), (), False),
        ("encoder-b", "encoder", ("b",), (), False),
        ("fusion", "fusion", ("encoder-a", "encoder-b"), ("a", "b"), True),
        ("head", "head", ("fusion",), (), False),
    ]
    assert [b.is_frozen for b in model.blocks()] == [False] * 4
    assert [b.task for b in model.blocks()][:3] == [None] * 3
    assert model.blocks()[3].task == TaskSpec("cross_entropy", 1.0, ())
    assert model.private_blocks == ("fusion", "head")


def test_the_blocks_of_stages_and_tasks() -> None:
    model = staged()
    found = [(b.name, b.inputs, b.is_frozen, b.state_prefix) for b in model.blocks()]
    assert found == [
        ("backbone-a", ("a",), True, "encoders.a.backbone."),
        ("neck-a", ("backbone-a",), False, "encoders.a.neck."),
        ("head-kind", ("neck-a",), False, "head.kind."),
        ("head-size", ("neck-a",), False, "head.size."),
    ]
    assert model.private_blocks == ("head-kind", "head-size")
    assert model.tasks == {
        "kind": TaskSpec("cross_entropy", 1.0, ("x", "y", "z")),
        "size": TaskSpec("mse", 0.5, ()),
    }
    assert [b.task for b in model.blocks()[2:]] == list(model.tasks.values())


@pytest.mark.parametrize("make", [build, staged])
def test_the_state_dict_is_the_blocks(make: Callable[[], BlockModel]) -> None:
    model = make()
    keys = [b.state_prefix + key for b in model.blocks() for key in b.module.state_dict()]
    assert sorted(keys) == sorted(model.state_dict())


def test_one_task_in_a_mapping_is_a_single_head() -> None:
    model = build(head={"kind": nn.Linear(4, 3)}, class_names={"kind": ("x", "y", "z")})
    head = model.blocks()[-1]
    assert (head.name, head.state_prefix) == ("head", "head.kind.")
    assert isinstance(model(EXAMPLES), Tensor)


def test_stages_and_tasks_as_module_dicts() -> None:
    stages = nn.ModuleDict({"one": nn.Linear(5, 4), "two": nn.Linear(4, 4)})
    heads = nn.ModuleDict({"x": nn.Linear(4, 3), "y": nn.Linear(4, 2)})
    model = build(encoders={"a": stages, "b": nn.Linear(6, 4)}, head=heads)
    assert [b.name for b in model.blocks()] == [
        "one-a", "two-a", "encoder-b", "fusion", "head-x", "head-y",
    ]  # fmt: skip
    assert [b.state_prefix for b in model.blocks()][1] == "encoders.a.two."


def test_a_parameterless_block_is_frozen() -> None:
    model = build(encoders={"a": nn.Linear(5, 6), "b": nn.ReLU()}, fusion=Join(6),
                  head=nn.Linear(6, 3))  # fmt: skip
    assert [b.is_frozen for b in model.blocks()] == [False, True, False, False]


def test_frozen_blocks_stay_as_they_are() -> None:
    backbone = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    model = staged(encoders={"a": {"backbone": backbone, "neck": nn.Linear(6, 4)}})
    assert not any(p.requires_grad for p in backbone.parameters())
    before = copy.deepcopy(backbone.state_dict())
    for train in (model.train, model.eval, lambda: model.train(True)):
        assert train() is model
        assert not backbone[1].training
    model(model.examples)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key])
    assert model.blocks()[1].module.training


def test_making_a_model_leaves_the_statistics_alone() -> None:
    norm = nn.BatchNorm1d(5)
    model = build(encoders={"a": nn.Sequential(norm, nn.Linear(5, 4)), "b": nn.Linear(6, 4)})
    assert norm.num_batches_tracked == 0
    assert model.training
    assert norm.training


def test_a_copy_has_blocks_of_its_own() -> None:
    model = build()
    other = copy.deepcopy(model)
    assert other.blocks()[0].module is other.encoders["a"]
    assert other.encoders["a"] is not model.encoders["a"]


# --- how blocks are called ---


def test_a_fusion_gets_a_dict_and_who_is_present() -> None:
    model = build()
    model(dict(reversed(EXAMPLES.items())))
    embeddings, present = last_call(model)
    assert list(embeddings) == ["a", "b"]
    assert torch.equal(present, torch.ones(3, 2))
    model({"b": EXAMPLES["b"][:2]})
    embeddings, present = last_call(model)
    assert torch.equal(embeddings["a"], torch.zeros(2, 4))
    assert torch.equal(present, torch.tensor([[0.0, 1.0]] * 2))


def test_zero_fill_has_no_present() -> None:
    model = build(missing="zero")
    assert not any(b.takes_present for b in model.blocks())
    model({"b": EXAMPLES["b"]})
    (embeddings,) = last_call(model)
    assert torch.equal(embeddings["a"], torch.zeros(3, 4))


@pytest.mark.parametrize("missing", ["mask", "zero"])
def test_heads_without_a_fusion(missing: str) -> None:
    heads = {"x": nn.Sequential(Join(), nn.Linear(4, 3)), "y": Join()}
    heads["x"] = Call(lambda m, z, *present: m.out(m.join(z, *present)), join=Join(),
                      out=nn.Linear(4, 3))  # fmt: skip
    model = build(fusion=None, head=heads, missing=missing)
    assert [(b.inputs, b.modalities, b.takes_present) for b in model.blocks()[2:]] == [
        (("encoder-a", "encoder-b"), ("a", "b"), missing == "mask")
    ] * 2
    outputs = model({"a": EXAMPLES["a"]})
    assert {task: output.shape for task, output in outputs.items()} == {"x": (3, 3), "y": (3, 4)}


def test_a_head_of_a_single_modality_takes_the_embedding() -> None:
    model = build(encoders={"a": nn.Linear(5, 4)}, fusion=None, examples={"a": EXAMPLES["a"]})
    assert model.blocks()[-1].modalities == ()
    assert not model.blocks()[-1].takes_present
    assert torch.equal(model(model.examples), model.head(model.encoders["a"](EXAMPLES["a"])))


def test_a_fusion_of_a_single_modality_is_still_a_fusion() -> None:
    model = build(encoders={"a": nn.Linear(5, 4)}, examples={"a": EXAMPLES["a"]})
    assert model.blocks()[1].modalities == ("a",)
    assert model(model.examples).shape == (3, 3)


def test_values_of_several_tensors() -> None:
    def split(module: Any, x: Tensor) -> Any:
        z = module.out(x)
        return {"low": z[:, :2], "rest": (z[:, 2:], [z[:, :1]])}

    model = build(
        encoders={"a": Call(split, out=nn.Linear(5, 4)), "b": nn.Linear(6, 4)},
        fusion=Call(
            lambda m, z, present: m.out(torch.cat([*flatten("", z["a"]).values(), z["b"]], 1)),
            out=nn.Linear(9, 4),
        ),
    )
    value = model.example_values["encoder-a"]
    assert list(flatten("encoder-a", value)) == [
        "encoder-a.low", "encoder-a.rest.0", "encoder-a.rest.1.0",
    ]  # fmt: skip
    assert model({"b": EXAMPLES["b"]}).shape == (3, 3)  # zeros in the same structure


def test_a_block_calls_its_module_as_the_model_does() -> None:
    model = build().eval()
    values: dict[str, Any] = dict(EXAMPLES)
    for block in model.blocks():
        values[block.name] = block(values, torch.ones(3, 2))
    assert torch.equal(values["head"], model(EXAMPLES))
    assert torch.equal(values["head"], model.example_values["head"])


def test_tokens_are_integers() -> None:
    model = build(
        encoders={"a": nn.EmbeddingBag(9, 4), "b": nn.Linear(6, 4)},
        examples={"a": torch.tensor([[0, 8], [1, 2], [3, 4]]), "b": EXAMPLES["b"]},
        num_values={"a": 9},
    )
    assert model({"a": model.examples["a"]}).shape == (3, 3)
    assert model.num_values == {"a": 9}


# --- losses ---


def test_the_loss_of_one_head_has_its_weight() -> None:
    model = build(loss_weights={"head": 3.0})
    outputs, labels = torch.zeros(2, 3), torch.tensor([0, 2])
    assert model.loss(outputs, labels).item() == pytest.approx(3 * 1.0986, abs=1e-4)  # log 3
    assert list(model.losses(outputs, labels)) == ["head"]


def test_the_loss_of_several_heads_is_the_weighted_sum() -> None:
    model = staged()
    outputs = {"kind": torch.zeros(2, 3), "size": torch.tensor([[1.0], [2.0]])}
    labels = {"kind": torch.tensor([0, 2]), "size": torch.tensor([[0.0], [0.0]])}
    losses = model.losses(outputs, labels)
    assert losses["size"].item() == 2.5
    assert model.loss(outputs, labels).item() == pytest.approx(1.0986 + 0.5 * 2.5, abs=1e-4)
    # A task without labels counts for nothing.
    assert model.loss(outputs, {"size": labels["size"]}).item() == pytest.approx(0.5 * 2.5)
    with pytest.raises(ModelError, match=r"^labels names 'color', expected one of kind, size$"):
        model.losses(outputs, {"color": labels["size"]})


@pytest.mark.parametrize(
    ("loss", "expected"), [("bce_with_logits", 0.6931), ("mse", 0.5), ("l1", 0.5)]
)
def test_the_other_losses(loss: str, expected: float) -> None:
    model = build(loss=loss)
    labels = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    found = model.loss(torch.zeros(1, 4), labels).item()
    assert found == pytest.approx(expected, abs=1e-4)


# --- trees of tensors ---

Pair = collections.namedtuple("Pair", ["x", "y"])
T = torch.zeros(1)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (T, ["z"]),
        ((T, T), ["z.0", "z.1"]),
        ([T, (T,)], ["z.0", "z.1.0"]),
        ({"k": T, "l": {"m": [T]}}, ["z.k", "z.l.m.0"]),
        (Pair(T, {"k": T}), ["z.0", "z.1.k"]),
        (collections.OrderedDict(k=T), ["z.k"]),
    ],
)
def test_flatten_and_its_inverse(value: Any, names: list[str]) -> None:
    assert list(flatten("z", value)) == names
    tensors = [torch.full((2,), i) for i in range(len(names))]
    rebuilt = unflatten(value, tensors)
    assert type(rebuilt) is type(value)
    assert all(a is b for a, b in zip(flatten("z", rebuilt).values(), tensors, strict=True))
    assert all(t is T for t in flatten("z", value).values())  # the original is left alone


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "block z: its output is NoneType, expected a tensor, or a tuple or dict of tensors"),
        ((T, {"k": 1.0}), r"block z: output 1\.k is float, expected a tensor"),
        ((), "block z: its output is an empty tuple, expected tensors"),
        ((T, {}), "block z: output 1 is an empty dict, expected tensors"),
        ({"a.b": T}, r"block z: its output is a dict with the key 'a\.b', expected a string"),
        ({0: T}, "block z: its output is a dict with the key 0, expected a string"),
    ],
)
def test_what_is_no_tree(value: Any, message: str) -> None:
    with pytest.raises(ModelError, match=f"^{message}"):
        flatten("z", value)


# --- refusals ---


def with_a(encoder: Any, **changes: Any) -> BlockModel:
    return build(encoders={"a": encoder, "b": nn.Linear(6, 4)}, **changes)


def with_example(a: Any, **changes: Any) -> BlockModel:
    return build(examples={"a": a, "b": EXAMPLES["b"]}, **changes)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def sharing(frozen_blocks: tuple[str, ...] = ()) -> BlockModel:
    table = nn.Linear(4, 4)
    return BlockModel(
        name="m",
        encoders={"a": {"one": nn.Linear(5, 4), "two": table}},
        head=nn.Sequential(nn.ReLU(), table),
        examples={"a": EXAMPLES["a"]},
        frozen_blocks=frozen_blocks,
    )


TOKENS = torch.zeros(3, 5, dtype=torch.int64)
LONG = "a" * 65

REFUSED: dict[str, tuple[Callable[[], BlockModel], str]] = {
    # names
    "model-name": (lambda: build(name="My model"), "model 'My model' does not match"),
    "modality-name": (
        lambda: build(encoders={"A": nn.Linear(5, 4)}, examples={"A": EXAMPLES["a"]}),
        "modality 'A' does not match",
    ),
    "modality-called-as-a-tensor": (
        lambda: build(encoders={"labels": nn.Linear(5, 4)}, examples={"labels": EXAMPLES["a"]}),
        "modality labels: the graphs have a tensor of that name",
    ),
    "modality-called-as-a-block": (
        lambda: build(encoders={"head": nn.Linear(5, 4)}, examples={"head": EXAMPLES["a"]}),
        "block head: the name is used twice",
    ),
    "modality-called-as-a-method": (
        lambda: build(encoders={"keys": nn.Linear(5, 4)}, examples={"keys": EXAMPLES["a"]}),
        "modality or stage 'keys': torch.nn.ModuleDict refuses the name",
    ),
    "stage-name": (lambda: with_a({"A": nn.Linear(5, 4)}), "block 'A-a' does not match"),
    "stage-name-with-a-dash": (
        lambda: build(
            encoders={"b-c": {"a": nn.Linear(5, 4)}, "c": {"a-b": nn.Linear(5, 4)}},
            examples={"b-c": EXAMPLES["a"], "c": EXAMPLES["a"]},
        ),
        "block a-b-c: the name is used twice",
    ),
    "task-name": (lambda: build(head={"a.b": nn.Linear(4, 3)}), r"task 'a\.b' does not match"),
    "task-too-long": (
        lambda: build(head={"x": nn.Linear(4, 3), LONG: nn.Linear(4, 3)}), "task 'aaaa"
    ),
    "frozen-blocks": (
        lambda: build(frozen_blocks=["encoder-c"]),
        "frozen_blocks names 'encoder-c', expected one of encoder-a, encoder-b, fusion, head",
    ),
    "frozen-blocks-as-a-string": (
        lambda: build(frozen_blocks="head"), "frozen_blocks is the string 'head'"
    ),
    "private-blocks": (lambda: build(private_blocks=("tail",)), "private_blocks names 'tail'"),
    "num-values-unknown": (lambda: build(num_values={"c": 2}), "num_values names 'c'"),
    "dynamic-axes-unknown": (lambda: build(dynamic_axes={"c": {1: (4, 17)}}),
                             "dynamic_axes names 'c'"),
    "missing": (lambda: build(missing="drop"), "missing names 'drop', expected one of mask, zero"),
    # examples
    "no-encoder": (lambda: build(encoders={}, examples={}), r"encoders are given for \[\]"),
    "no-example": (
        lambda: build(examples={"a": EXAMPLES["a"]}),
        r"encoders are given for \['a', 'b'\], examples for \['a'\]",
    ),
    "lengths": (
        lambda: with_example(torch.zeros(2, 5)), "the example batches differ in length: a 2, b 3"
    ),
    "double": (lambda: with_example(torch.zeros(3, 5).double()), "modality a: .* torch.float64"),
    "empty": (lambda: with_example(torch.zeros(0, 5)), "modality a: the example is no batch"),
    "scalar": (lambda: with_example(torch.tensor(1.0)), "modality a: the example is no batch"),
    "list": (lambda: with_example([1.0]), "modality a: the example is no batch"),
    "no-num-values": (lambda: with_example(TOKENS), "modality a: .*; int64 needs num_values"),
    "num-values-of-floats": (
        lambda: build(num_values={"a": 9}), "modality a: .*; num_values is for int64"
    ),
    "value-too-large": (
        lambda: with_example(TOKENS + 9, num_values={"a": 9}),
        r"modality a: the example holds 9, outside \[0, 9\)",
    ),
    "value-too-small": (
        lambda: with_example(TOKENS - 1, num_values={"a": 9}),
        r"modality a: the example holds -1, outside \[0, 9\)",
    ),
    "batch-axis": (lambda: build(dynamic_axes={"a": {0: (4, 17)}}), "modality a: dynamic axis 0"),
    "axis": (
        lambda: build(dynamic_axes={"a": {2: (4, 17)}}),
        "modality a: dynamic axis 2, expected one of 1 to 1",
    ),
    # tasks
    "no-head": (lambda: build(head={}), "there is no head"),
    "no-stage": (lambda: with_a({}), "modality a: its encoder has no stage"),
    "loss": (
        lambda: build(loss="hinge"),
        "the loss of head names 'hinge', expected one of cross_entropy, bce_with_logits, mse, l1",
    ),
    "loss-of-one-task": (lambda: staged(loss={"kind": "cross_entropy"}), "the loss of size"),
    "loss-of-no-task": (lambda: staged(loss={"x": "mse"}), "loss names 'x', .*kind, size"),
    "weight-of-no-task": (lambda: build(loss_weights={"x": 1.0}), "loss_weights names 'x'"),
    "weight": (lambda: build(loss_weights={"head": 0.0}), "loss_weights of head: 0.0, expected"),
    "class-names-of-no-task": (lambda: build(class_names={"x": ()}), "class_names names 'x'"),
    "class-names": (
        lambda: build(class_names=("x",)),
        r"block head: output of shape \(3, 3\) for 1 class names",
    ),
    "one-class": (
        lambda: build(head=nn.Linear(4, 1)),
        r"block head: output of shape \(3, 1\), expected \(b, num_classes\) with two classes",
    ),
    "classes-by-place": (
        lambda: build(head=Call(lambda m, x: m.out(x).unsqueeze(1), out=nn.Linear(4, 3))),
        r"block head: output of shape \(3, 1, 3\), expected \(b, num_classes\)",
    ),
    "head-of-two-outputs": (
        lambda: build(head=Call(lambda m, x: (m.out(x), x), out=nn.Linear(4, 3))),
        "block head: 2 outputs, a head has one tensor",
    ),
    # modules
    "no-module": (lambda: with_a(len), "block encoder-a: found .*, expected a torch.nn.Module"),
    "shared-parameter": (sharing, r"blocks two-a and head share the parameter 1\.weight"),
    "shared-with-a-frozen-block": (
        lambda: sharing(("two-a",)), r"blocks two-a and head share the parameter 1\.weight"
    ),
    "double-parameter": (
        lambda: with_a(nn.Linear(5, 4).double()),
        "block encoder-a: weight is torch.float64, expected torch.float32",
    ),
    "partially-frozen": (
        lambda: with_a(nn.Sequential(frozen(nn.Linear(5, 4)), nn.Linear(4, 4))),
        r"block encoder-a: 0\.weight has requires_grad False; give the frozen part a stage of its "
        "own and name it in frozen_blocks",
    ),
    "frozen-but-not-named": (
        lambda: with_a(frozen(nn.Linear(5, 4))),
        "block encoder-a: no parameter has requires_grad; name it in frozen_blocks",
    ),
    "nothing-trains": (
        lambda: build(frozen_blocks=["encoder-a", "encoder-b", "fusion", "head"]),
        "every block is frozen",
    ),
    "dropout-in-a-parameterless-block": (
        lambda: build(head={"one": nn.Linear(4, 3)}, encoders={
            "a": {"one": nn.Linear(5, 4), "drop": nn.Dropout(0.5)}, "b": nn.Linear(6, 4)}),
        "block drop-a: it has no parameters and so is frozen, which switches Dropout off",
    ),
    "raises": (lambda: with_a(nn.Linear(7, 4)), "block encoder-a: its forward pass fails: Runtime"),
    "none": (lambda: with_a(Call(lambda m, x: None)), "block encoder-a: its output is NoneType"),
    "integers": (
        lambda: with_a(Call(lambda m, x: (x[:, :4], x.long())), fusion=Call(
            lambda m, z, present: m.out(z["b"]), out=nn.Linear(4, 4))),
        r"block encoder-a: encoder-a\.1 is torch\.int64, expected torch\.float32",
    ),
    "another-length": (
        lambda: build(head=Call(lambda m, x: m.out(x)[:2], out=nn.Linear(4, 3))),
        r"block head: head has shape \(2, 3\), expected 3 examples first, as in its input",
    ),
    "scalar-output": (
        lambda: build(head=Call(lambda m, x: m.out(x).sum(), out=nn.Linear(4, 3)), loss="mse"),
        r"block head: head has shape \(\), expected 3 examples first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ModelError, match=f"^{message}") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_frozen_blocks_may_share() -> None:
    assert [b.is_frozen for b in sharing(("two-a", "head")).blocks()] == [False, True, True]


def test_a_named_parameterless_block_may_hold_dropout() -> None:
    encoder = {"one": nn.Linear(5, 4), "drop": nn.Dropout(0.5)}
    model = with_a(encoder, frozen_blocks=["drop-a"])
    assert not encoder["drop"].training
    assert model.blocks()[1].is_frozen


def test_inputs_that_the_model_does_not_have() -> None:
    with pytest.raises(ModelError, match=r"^inputs names 'c', expected one of a, b$"):
        build()({"c": EXAMPLES["a"]})
    with pytest.raises(ModelError, match=r"^no modality, the model has a, b$"):
        build()({})


def test_a_failing_forward_pass_names_the_block() -> None:
    with pytest.raises(ModelError, match=r"^block encoder-b: its forward pass fails: RuntimeError"):
        build()({"b": torch.zeros(3, 7)})


# --- cutting a module ---


class Whole(nn.Module):
    """A module of somebody's own: two inputs, two outputs, parts at various depths."""

    def __init__(self, glue: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.vision = nn.ModuleDict({"stem": nn.Linear(5, 6), "neck": nn.Linear(6, 4)})
        self.audio = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.join = Join()
        self.outs = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 2)])
        self.glue, self.shift = glue, shift

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        z = {"a": self.vision["neck"](self.vision["stem"](a)), "b": self.audio(b)}
        fused = self.glue * self.join(z)
        return self.outs[0](fused), self.outs[1](fused) + self.shift


def cut(module: nn.Module, **changes: Any) -> BlockModel:
    options: dict[str, Any] = {
        "encoders": {"a": {"stem": "vision.stem", "neck": "vision.neck"}, "b": "audio"},
        "fusion": "join",
        "head": {"x": "outs.0", "y": "outs.1"},
        "name": "whole",
        "examples": EXAMPLES,
        "frozen_blocks": ["stem-a"],
    }
    return BlockModel.cut(module, **{**options, **changes})


def test_a_cut_model_is_the_module() -> None:
    module = Whole()
    model = cut(module)
    assert {b.name: b.state_prefix for b in model.blocks()} == {
        "stem-a": "vision.stem.",
        "neck-a": "vision.neck.",
        "encoder-b": "audio.",
        "fusion": "join.",
        "head-x": "outs.0.",
        "head-y": "outs.1.",
    }
    keys = [b.state_prefix + key for b in model.blocks() for key in b.module.state_dict()]
    assert sorted(keys) == sorted(module.state_dict())
    assert model.blocks()[0].module is module.vision["stem"]
    assert not module.vision["stem"].training
    assert module.audio.training
    model.eval()
    outputs = model(EXAMPLES)
    for found, expected in zip(outputs.values(), module(**EXAMPLES), strict=True):
        assert torch.equal(found, expected)


def test_a_cut_with_a_call_of_its_own() -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x, y = module(inputs["a"], inputs["b"])
        return {"y": y, "x": x}

    assert cut(Whole(), call=call).tasks.keys() == {"x", "y"}


def test_a_cut_of_one_sequence() -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    model = BlockModel.cut(
        module, encoders={"a": {"in": "0", "act": "1"}}, head="2", name="m",
        examples={"a": EXAMPLES["a"]}, call=lambda module, inputs: module(inputs["a"]),
    )  # fmt: skip
    assert [b.state_prefix for b in model.blocks()] == ["0.", "1.", "2."]
    assert torch.equal(model(model.examples), module(EXAMPLES["a"]))


def extended(**layers: nn.Module) -> nn.Module:
    module = Whole()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


UNCUT: dict[str, tuple[Callable[[], BlockModel], str]] = {
    "glue": (
        lambda: cut(Whole(glue=1.1)),
        "the module's output x and that of its blocks differ by .*: there is computation between "
        "the blocks that belongs to none of them",
    ),
    "afterwards": (lambda: cut(Whole(shift=0.1)), "the module's output y and that of its blocks"),
    "a-parameter-of-none": (
        lambda: cut(extended(extra=nn.Linear(2, 2))),
        r"parameter extra\.weight belongs to no block",
    ),
    "dropout-of-none": (
        lambda: cut(extended(extra=nn.Dropout(0.5))),
        r"Dropout\(p=0.5, inplace=False\) belongs to no block, and would not act in training",
    ),
    "no-such-part": (
        lambda: cut(Whole(), fusion="mix"), "Whole has no submodule 'mix'"
    ),
    "one-part-twice": (
        lambda: cut(Whole(), head={"x": "outs.0", "y": "outs.0"}),
        "blocks head-x and head-y share the parameter weight",
    ),
    "call-fails": (
        lambda: cut(Whole(), call=lambda module, inputs: module(inputs["a"])),
        "calling Whole fails: TypeError",
    ),
    "another-shape": (
        lambda: cut(Whole(), call=lambda module, inputs: module(**inputs)[::-1]),
        r"the module's output x is \(3, 2\), the blocks give \(3, 3\)",
    ),
    "too-few-outputs": (
        lambda: cut(Whole(), call=lambda module, inputs: module(**inputs)[:1]),
        r"the module's output y is NoneType, the blocks give \(3, 2\)",
    ),
    "not-a-tensor": (
        lambda: cut(Whole(), call=lambda module, inputs: 3),
        r"the module's output x is int, the blocks give \(3, 3\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNCUT)
def test_cuts_that_are_refused(case: str) -> None:
    make, message = UNCUT[case]
    with pytest.raises(ModelError, match=f"^{message}"):
        make()
