from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor, nn

from export import BlockModel, export_model, merge, warm_start
from export.models.avmnist import digits
from export.models.projector import projector
from export.weights import server_weights
from petalfl.engine import OrtEngine
from petalfl.errors import EnrollError, ModelError, PetalError, StoreError, TransportError
from petalfl.local_model import LocalModel
from petalfl.model import ModelManifest, read_artifact
from petalfl.reference import Reference, take_steps
from petalfl.steps import predict_outputs
from petalfl.store import DeviceStore, FineTuned, Identity, State
from petalfl.vectors import Vector, from_bytes, to_bytes
from server.state import Closing, NewVersion, ServerState
from tests.export.tiny import small
from tests.server.builders import FED, INITIAL, LAYOUT, Site
from tests.server.test_web import TOKEN, serve

LIMIT = 1e-5
OTHER_FUSION = ("fusion", ("encoder-acc", "encoder-gyro"), {"mix.weight": (4,)})


# --- the models ---


class Tied(nn.Module):
    """Two layers with one weight, a batch norm, a buffer of its own; gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        self.down.weight = self.up.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("offset", torch.randn(4))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.up(x)).relu()
        assert isinstance(self.offset, Tensor)
        return y, self.down(y) + self.offset


class Words(nn.Module):
    """The mean of embedded words, however many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, words: Tensor) -> Tensor:
        mean: Tensor = self.table(words).mean(1)
        return mean


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(12, 6)

    def forward(self, embeddings: Mapping[str, Any]) -> Tensor:
        (y, z), words = embeddings["a"], embeddings["words"]
        mixed: Tensor = self.mix(torch.cat([y, z, words], 1)).tanh()
        return mixed


class Own(nn.Module):
    """A user's class: two tasks, a module under two names, a buffer that no block holds."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({"a": Tied(), "words": Words()})
        self.alias = self.nets["a"]
        self.join = Join()
        self.kind, self.size = nn.Linear(6, 3), nn.Linear(6, 1)
        self.register_buffer("class_counts", torch.randint(9, (3,)))

    def forward(self, a: Tensor, words: Tensor) -> dict[str, Tensor]:
        z = self.join({"a": self.nets["a"](a), "words": self.nets["words"](words)})
        return {"kind": self.kind(z), "size": self.size(z)}


def cut(module: nn.Module) -> BlockModel:
    return BlockModel.cut(
        module,
        name="own",
        encoders={"a": "nets.a", "words": "nets.words"},
        fusion="join",
        head={"kind": "kind", "size": "size"},
        examples={"a": torch.randn(3, 4), "words": torch.randint(9, (3, 5))},
        loss={"kind": "cross_entropy", "size": "mse"},
        missing="zero",
        num_values={"words": 9},
        dynamic_axes={"words": {1: (4, 17)}},
    )


def own(seed: int = 0) -> BlockModel:
    torch.manual_seed(seed)
    return cut(Own())


def unfused(seed: int = 0) -> BlockModel:
    """Heads that join the modalities themselves, called as a modality and a block are."""

    class Head(nn.Linear):
        def forward(self, embeddings: Mapping[str, Tensor], present: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(torch.cat([*embeddings.values(), present], 1))

    torch.manual_seed(seed)
    return BlockModel(
        name="unfused",
        encoders={"relu": nn.Linear(5, 4), "b": nn.Sequential(nn.Linear(3, 4), nn.ReLU())},
        head={"b": Head(10, 3), "encoder-b": Head(10, 2)},
        examples={"relu": torch.randn(2, 5), "b": torch.randn(2, 3)},
        loss={"b": "cross_entropy", "encoder-b": "bce_with_logits"},
    )


MODELS: dict[str, Callable[[], BlockModel]] = {
    "small": small, "digits": digits, "projector": projector, "own": own, "unfused": unfused,
}  # fmt: skip


class Exported(NamedTuple):
    """Artifacts, and a server's data folder with other values."""

    artifacts: Path
    manifest: ModelManifest
    data: Path
    vectors: dict[str, Vector]  # initial, and the server's where it has some


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    made: dict[str, Exported] = {}

    def export(name: str) -> Exported:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:  # the law has tests of its own
                patch.setattr("export.artifacts.check_one_step", lambda model, folder: None)
                folder = tmp_path_factory.mktemp(name)
                manifest = export_model(MODELS[name](), folder / "artifacts", source="x:y")
            vectors = initial(folder / "artifacts", manifest)
            trained = {b.name: b for b in manifest.blocks if not b.is_frozen}
            new = {n: changed(manifest, n, vectors[n]) for n in trained}
            serve_folder(folder / "data", manifest, new)
            made[name] = Exported(folder / "artifacts", manifest, folder / "data", vectors | new)
        return made[name]

    return export


@pytest.fixture
def tied(exported: Callable[[str], Exported]) -> Exported:
    return exported("own")


def initial(artifacts: Path, manifest: ModelManifest) -> dict[str, Vector]:
    return {
        b.name: from_bytes(read_artifact(artifacts, b.artifacts.parameters), b.size)
        for b in manifest.blocks
    }


def changed(manifest: ModelManifest, block: str, vector: Vector) -> Vector:
    """As after some training; variances stay positive."""
    rng = np.random.default_rng(len(block))
    end = sum(p.size for p in manifest.block(block).parameters)
    noise = rng.normal(0, 0.05, vector.size).astype(np.float32)
    return np.concatenate([vector[:end] + noise[:end], vector[end:] + np.abs(noise[end:])])


def serve_folder(folder: Path, manifest: ModelManifest, vectors: Mapping[str, Vector]) -> None:
    """A server's data folder whose versions 9 and 10 differ."""
    state = ServerState(folder)
    blocks = [manifest.block(name) for name in vectors]
    for number in range(1, 11):
        state.open_round(number, {}, 0.0)
        momentum = [{"velocity": np.ones(b.size, np.float32)} for b in blocks]
        state.step(
            number,
            [
                state.write_version(
                    NewVersion(b, number, vectors[b.name] + np.float32(10 - number), m)
                )
                for b, m in zip(blocks, momentum, strict=True)
            ],
            {},
            Closing(1.0, None, num_late=0),
        )
    state.close()


def subsets(manifest: ModelManifest) -> Iterator[tuple[str, ...]]:
    names = list(manifest.modalities)
    return itertools.chain.from_iterable(
        itertools.combinations(names, n) for n in range(1, len(names) + 1)
    )


def draw(manifest: ModelManifest, modalities: Collection[str], length: int) -> dict[str, Any]:
    rng = np.random.default_rng(length)
    inputs: dict[str, Any] = {}
    for name in modalities:
        modality = manifest.modalities[name]
        shape = [length, *(dim or 7 for dim in modality.shape)]
        if modality.num_values is None:
            inputs[name] = rng.standard_normal(shape, dtype=np.float32)
        else:
            inputs[name] = rng.integers(0, modality.num_values, shape)
    return inputs


def by_task(model: BlockModel, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    with torch.no_grad():
        outputs = model.eval()({name: torch.from_numpy(x) for name, x in inputs.items()})
    if isinstance(outputs, Tensor):
        outputs = dict.fromkeys(model.tasks, outputs)
    return {task: y.numpy() for task, y in outputs.items()}


def assert_equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, y in expected.items():
        assert found[name].shape == y.shape
        np.testing.assert_allclose(found[name], y, rtol=LIMIT, atol=LIMIT * np.abs(y).max())


# --- to PyTorch ---


@pytest.mark.parametrize("name", MODELS)
def test_the_state_dict_makes_a_fresh_model_the_federations(
    name: str, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    folder, manifest, data, vectors = exported(name)
    merged = merge(folder, tmp_path / "model.pt", weights=data)
    for block, weights in merged.items():
        assert (weights.vector == vectors[block]).all()
        is_frozen = manifest.block(block).is_frozen
        assert weights.origin == ("artifacts" if is_frozen else "server, version 10")
    model = MODELS[name]() if name == "small" else MODELS[name](seed=1)  # type: ignore[call-arg]
    model.whole().load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)
    engine = OrtEngine(folder)
    for subset in subsets(manifest):
        inputs = draw(manifest, subset, 4)
        assert_equal(by_task(model, inputs), predict_outputs(engine, manifest, vectors, inputs))


def test_the_initial_state_dict_is_the_one_that_was_exported(
    tied: Exported, tmp_path: Path
) -> None:
    """With the buffers that no vector holds, and both keys of what is tied."""
    merged = merge(tied.artifacts, tmp_path / "model.pth")
    assert {weights.origin for weights in merged.values()} == {"artifacts"}
    found = torch.load(tmp_path / "model.pth")
    expected = own().whole().state_dict()
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert {"nets.a.down.weight", "alias.up.weight", "nets.a.norm.num_batches_tracked",
            "class_counts"} < found.keys()  # fmt: skip
    assert "nets.a.scratch" not in found


def test_a_users_own_class_outputs_the_same(tied: Exported, tmp_path: Path) -> None:
    merge(tied.artifacts, tmp_path / "model.pt", weights=tied.data)
    torch.manual_seed(2)
    module = Own()
    module.load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)
    tied_up = module.nets["a"]
    assert isinstance(tied_up, Tied)
    assert tied_up.up.weight is tied_up.down.weight  # still
    inputs = draw(tied.manifest, ("a", "words"), 5)
    with torch.no_grad():
        found = module.eval()(**{name: torch.from_numpy(x) for name, x in inputs.items()})
    expected = predict_outputs(OrtEngine(tied.artifacts), tied.manifest, tied.vectors, inputs)
    assert_equal({task: y.numpy() for task, y in found.items()}, expected)


def test_a_state_dict_without_the_parameters_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their values at export would go for the federation's."""
    monkeypatch.setattr("export.artifacts.check_one_step", lambda model, folder: None)
    model = small()

    def copy_weights(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
        state[f"{prefix}0.weight"] = state[f"{prefix}0.weight"].clone()

    hooked: Any = model.encoders["a"]
    hooked.register_state_dict_post_hook(copy_weights)
    export_model(model, tmp_path / "artifacts")
    with pytest.raises(ModelError, match=r"block encoder-a: 0\.weight is not in the state_dict"):
        merge(tmp_path / "artifacts", tmp_path / "model.pt")
    merge(tmp_path / "artifacts", tmp_path / "model.onnx")


def test_the_same_bytes_every_time(tied: Exported, tmp_path: Path) -> None:
    for kind in ("pt", "onnx"):
        first, second = tmp_path / f"first.{kind}", tmp_path / f"second.{kind}"
        for path in (first, second):
            merge(tied.artifacts, path, weights=tied.data)
        assert first.read_bytes() == second.read_bytes()


# --- to ONNX ---


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_every_subset_of_modalities(
    name: str, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    folder, manifest, data, vectors = exported(name)
    engine = OrtEngine(folder)
    for subset in subsets(manifest):
        merge(folder, tmp_path / "model.onnx", weights=data, modalities=subset[::-1])
        session = onnxruntime.InferenceSession(
            str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        assert [value.name for value in session.get_inputs()] == list(subset)
        outputs = [value.name for value in session.get_outputs()]
        tasks = list(manifest.heads)
        assert outputs == (["head-b", "head-encoder-b"] if name == "unfused" else tasks)
        for length in (1, 3):
            inputs = draw(manifest, subset, length)
            found = dict(zip(tasks, session.run(outputs, inputs), strict=True))
            assert_equal(found, predict_outputs(engine, manifest, vectors, inputs))


def test_the_graph_decides_as_the_device_does(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    folder, manifest, data, vectors = exported("digits")
    merge(folder, tmp_path / "model.onnx", weights=data)
    device = LocalModel.open(manifest, folder, manifest.blocks, 1).with_parameters(vectors)
    inputs = draw(manifest, manifest.modalities, 6)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(None, inputs)
    assert (logits.argmax(1) == device.predict(inputs)).all()
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, device.predict_proba(inputs), atol=LIMIT)


def test_the_parameters_are_initializers_of_their_own(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    folder, manifest, data, vectors = exported("small")
    merge(folder, tmp_path / "model.onnx", weights=data)
    graph = onnx.load(tmp_path / "model.onnx").graph
    values = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    for block in manifest.blocks:
        parts = [values[f"{block.name}/{p.name}"] for p in block.parameters]
        assert [part.shape for part in parts] == [p.shape for p in block.parameters]
        assert (np.concatenate([part.ravel() for part in parts]) == vectors[block.name]).all()
    assert [graph.input[0].type.tensor_type.shape.dim[0].dim_param] == ["batch"]
    assert "Split" not in {node.op_type for node in graph.node}


def test_ort_format_cannot_be_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.artifacts.check_one_step", lambda model, folder: None)
    export_model(small(), tmp_path / "ort", file_format="ort")
    with pytest.raises(ModelError, match=r"ORT format.*--format onnx"):
        merge(tmp_path / "ort", tmp_path / "model.onnx")
    merge(tmp_path / "ort", tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt").keys() == small().state_dict().keys()


# --- weights ---


def copied(data: Path, to: Path, version: int = 10) -> Path:
    for path in data.glob(f"blocks/*/{version}.safetensors"):
        (to / path.parent.name).mkdir(parents=True)
        (to / path.parent.name / path.name).write_bytes(path.read_bytes())
    return to


def test_a_folder_of_blocks_alone(tied: Exported, tmp_path: Path) -> None:
    folder = copied(tied.data, tmp_path / "blocks-9", version=9)
    (folder / "fusion" / "9.safetensors").unlink()
    merged = merge(tied.artifacts, tmp_path / "model.pt", weights=folder)
    assert merged["fusion"].origin == "artifacts"
    assert merged["head-kind"].origin == "server, version 9"
    assert (merged["head-kind"].vector == tied.vectors["head-kind"] + 1).all()


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load(path.read_bytes())
    change(tensors)
    path.write_bytes(save(tensors))


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda t: t.pop("bias"), r"tensor bias is None, expected \(\(3,\), 'float32'\)"),
    "shape": (lambda t: t.update(bias=np.zeros((1, 3), np.float32)), r"tensor bias is \(\(1, 3\)"),
    "dtype": (lambda t: t.update(bias=np.zeros(3)), "'float64'"),
    "more": (lambda t: t.update(more=np.zeros(3)), "tensor more"),
    "NaN": (lambda t: t.update(bias=np.full(3, np.nan, np.float32)), "head-kind: a value is NaN"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_versions_that_do_not_fit(kind: str, tied: Exported, tmp_path: Path) -> None:
    change, message = DAMAGES[kind]
    folder = copied(tied.data, tmp_path / "blocks")
    rewritten(folder / "head-kind" / "10.safetensors", change)
    with pytest.raises(ModelError, match=message):
        merge(tied.artifacts, tmp_path / "model.pt", weights=folder)
    assert not (tmp_path / "model.pt").exists()


def test_folders_of_weights_that_are_none(
    tied: Exported, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"no weights at .*BLOCK/VERSION\.safetensors"):
        merge(tied.artifacts, tmp_path / "model.pt", weights=tmp_path / "nowhere")
    with pytest.raises(ModelError, match="of another model: encoder-b is none of its blocks"):
        merge(tied.artifacts, tmp_path / "model.pt", weights=exported("small").data)
    folder = copied(tied.data, tmp_path / "blocks")
    (folder / "fusion" / "10.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match=r"cannot read .*fusion/10\.safetensors"):
        merge(tied.artifacts, tmp_path / "model.pt", weights=folder)


async def test_a_running_server(tmp_path: Path) -> None:
    """Which lets the holder of the join token read all shared blocks."""
    async with serve(tmp_path, private_blocks=("head",)) as served:
        served.run.ready("watch")
        await served.run.finish_round(1, 2.0)
        url = str(served.client.make_url("")).rstrip("/")
        manifest = served.site.manifest
        ticks: list[tuple[int, int]] = []
        found = await asyncio.to_thread(
            server_weights, url, manifest, token=TOKEN, federation=FED,
            progress=lambda done, total: ticks.append((done, total)),
        )  # fmt: skip
        assert found.keys() == {"encoder-acc", "encoder-gyro", "fusion"}
        assert found["encoder-acc"].origin == "server, version 2"
        assert (found["encoder-acc"].vector == INITIAL["encoder-acc"] + 2).all()
        assert (found["encoder-gyro"].vector == INITIAL["encoder-gyro"]).all()
        assert ticks == [(0, 3), (1, 3), (2, 3), (3, 3)]
        traffic = served.run.state.history.device_traffic()
        assert all(not by_block for by_block in traffic.values())  # no device's

        for token, federation, kind in (("no", FED, EnrollError), (TOKEN, "no", TransportError)):
            with pytest.raises(kind):
                await asyncio.to_thread(
                    server_weights, url, manifest, token=token, federation=federation
                )
        other = Site(tmp_path / "other", layout=LAYOUT | {"fusion": OTHER_FUSION})
        with pytest.raises(ModelError, match="has another model"):
            await asyncio.to_thread(
                server_weights, url, other.manifest, token=TOKEN, federation=FED
            )


def test_servers_that_are_none(tied: Exported, tmp_path: Path) -> None:
    for url, kind in (("http://", ModelError), ("http://127.0.0.1:9", TransportError)):
        with pytest.raises(kind):
            merge(tied.artifacts, tmp_path / "model.pt", weights=url)


# --- artifacts to start from ---


def test_artifacts_that_start_from_what_was_trained(tied: Exported, tmp_path: Path) -> None:
    """Nothing else of them changes but the reference steps, which follow the values."""
    warm = tmp_path / "warm"
    merged = warm_start(tied.artifacts, warm, weights=tied.data)
    assert {w.origin for w in merged.values()} == {"server, version 10"}
    manifest = ModelManifest.load(warm)
    for name, vector in initial(warm, manifest).items():
        np.testing.assert_array_equal(vector, tied.vectors[name])
    assert manifest.layout_sha256 == tied.manifest.layout_sha256
    changed_files = {
        path.relative_to(warm).as_posix()
        for path in warm.rglob("*")
        if path.is_file()
        and path.read_bytes() != (tied.artifacts / path.relative_to(warm)).read_bytes()
    }
    values = {f"{b.name}/parameters.bin" for b in manifest.blocks if not b.is_frozen}
    assert changed_files == {"manifest.json", "reference.json", *values}
    steps = take_steps(OrtEngine(warm), manifest, warm, Reference.load(warm))
    assert steps.difference(Reference.load(warm)) < 1e-6
    assert steps.difference(Reference.load(tied.artifacts)) > 1e-4
    again = merge(warm, tmp_path / "model.pt")
    assert {w.origin for w in again.values()} == {"artifacts"}
    (warm / "fusion" / "parameters.bin").unlink()  # it is replaced as a whole
    warm_start(tied.artifacts, warm, weights=tied.data)
    assert ModelManifest.load(warm) == manifest


def test_artifacts_that_are_not_written(
    tied: Exported, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis").write_bytes(b"")
    cases: dict[str, tuple[Path, Path]] = {
        "is what the values are to go into; choose another": (tied.artifacts, tied.data),
        r"holds something that is no artifacts folder \(thesis": (tmp_path / "else", tied.data),
        "is none of its blocks": (tmp_path / "warm", exported("small").data),
    }
    for message, (out, weights) in cases.items():
        with pytest.raises(ModelError, match=message):
            warm_start(tied.artifacts, out, weights=weights)
    assert {path.name for path in tmp_path.iterdir()} == {"else"}


# --- private blocks ---


def fill_store(folder: Path, private: Mapping[str, Vector], manifest: bytes | None = None) -> Path:
    store = DeviceStore(folder)
    store.write_identity(Identity("default", "car-7", "p" * 20, tuple(private)))
    store.write_state(State(3, {name: to_bytes(vector) for name, vector in private.items()}))
    if manifest is not None:
        store.write_file("manifest.json", manifest)
    store.close()
    return folder


def test_a_devices_private_blocks_go_before_all(tied: Exported, tmp_path: Path) -> None:
    mine = {"head-kind": tied.vectors["head-kind"] + 1}
    store = fill_store(tmp_path / "store", mine, tied.manifest.to_json())
    for weights in (None, tied.data):
        merged = merge(tied.artifacts, tmp_path / "model.pt", weights=weights, private=store)
        assert merged["head-kind"].origin == "device car-7"
        assert (merged["head-kind"].vector == mine["head-kind"]).all()
        rest = "artifacts" if weights is None else "server, version 10"
        assert {w.origin for n, w in merged.items() if n != "head-kind"} == {rest}
    bias = torch.load(tmp_path / "model.pt")["kind.bias"]
    assert (bias.numpy() == mine["head-kind"][-3:]).all()


def test_a_devices_private_tensors_go_into_shared_blocks(tied: Exported, tmp_path: Path) -> None:
    store = DeviceStore(tmp_path / "store")
    store.write_identity(Identity("default", "car-7", "p" * 20, (), ("head-kind/bias",)))
    bias = np.arange(3, dtype=np.float32)
    store.write_state(State(3, private_tensors={"head-kind/bias": to_bytes(bias)}))
    store.close()
    merged = merge(
        tied.artifacts, tmp_path / "model.pt", weights=tied.data, private=tmp_path / "store"
    )
    found, shared = (
        merged["head-kind"],
        merge(tied.artifacts, tmp_path / "other.pt", weights=tied.data)["head-kind"],
    )
    assert found.origin == "server, version 10, private tensors of device car-7"
    np.testing.assert_array_equal(found.vector[-3:], bias)
    np.testing.assert_array_equal(found.vector[:-3], shared.vector[:-3])
    assert {w.origin for n, w in merged.items() if n != "head-kind"} == {"server, version 10"}


def test_what_a_device_has_fine_tuned_goes_before_its_private_blocks(
    tied: Exported, tmp_path: Path
) -> None:
    mine = {"head-kind": tied.vectors["head-kind"] + 1}
    own = {name: to_bytes(tied.vectors[name] + 2) for name in ("fusion", "head-kind")}
    expected = "device car-7, fine-tuned"
    for round_num, private, origin in (
        (3, mine, expected),
        (3, {}, expected),  # a device that shares all has fine-tuned blocks, too
        (2, mine, "device car-7"),  # made before the last round: the device has dropped it, or will
    ):
        store = DeviceStore(fill_store(tmp_path / f"{round_num}-{len(private)}", private))
        store.write_fine_tuned(FineTuned("a" * 64, round_num, "", own))
        store.close()
        merged = merge(
            tied.artifacts, tmp_path / "model.pt", weights=tied.data, private=store.folder
        )
        found = {name: weights.origin for name, weights in merged.items()}
        assert found["head-kind"] == origin
        assert found["fusion"] == (expected if origin == expected else "server, version 10")
        added = merged["head-kind"].vector - tied.vectors["head-kind"]
        np.testing.assert_allclose(added, 2 if origin == expected else 1, rtol=1e-6)


def test_stores_that_do_not_fit(
    tied: Exported, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    to, vector = tmp_path / "model.pt", tied.vectors["head-kind"]
    other = exported("small").manifest
    stores = {
        "is no device store": tmp_path / "nowhere",
        "holds no private blocks": fill_store(tmp_path / "1", {}),
        "has another model: 'small'": fill_store(
            tmp_path / "2", {"head-kind": vector}, other.to_json()
        ),
        "holds tail, which is no block of 'own'": fill_store(tmp_path / "3", {"tail": vector}),
        "block head-kind: .* bytes, expected": fill_store(
            tmp_path / "4", {"head-kind": vector[1:]}
        ),
    }
    for message, store in stores.items():
        with pytest.raises(PetalError, match=message):
            merge(tied.artifacts, to, private=store)
    assert not (tmp_path / "nowhere").exists()
    store = fill_store(tmp_path / "open", {"head-kind": vector})
    in_use = DeviceStore(store)
    with pytest.raises(StoreError, match="is open already"):
        merge(tied.artifacts, to, private=store)
    in_use.close()
    (store / "state.msgpack").write_bytes(b"x" * 40)
    with pytest.raises(StoreError, match="damaged"):
        merge(tied.artifacts, to, private=store)
    assert not to.exists()


# --- what else a user can get wrong ---


def test_targets_that_are_none(tied: Exported, tmp_path: Path) -> None:
    for name in ("model", "model.onxx", "model.pt.gz", "pt"):
        with pytest.raises(ModelError, match=r"expected a file that ends in \.pt, \.pth or \.onnx"):
            merge(tied.artifacts, tmp_path / name)
    (tmp_path / "folder.pt").mkdir()
    for name in ("folder.pt", "nowhere/model.pt"):
        with pytest.raises(ModelError, match=f"cannot write .*{name}"):
            merge(tied.artifacts, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt"]


def test_modalities_that_are_none(tied: Exported, tmp_path: Path) -> None:
    for modalities, message in ((["a", "c"], "found modality 'c'"), ([], "found no modality")):
        with pytest.raises(ModelError, match=f"{message}, the model has a, words"):
            merge(tied.artifacts, tmp_path / "model.onnx", modalities=modalities)
    with pytest.raises(ModelError, match="a state_dict of all modalities"):
        merge(tied.artifacts, tmp_path / "model.pt", modalities=["a"])


@pytest.fixture
def broken(tied: Exported, tmp_path: Path) -> Path:
    """A copy of the artifacts to damage."""
    for path in tied.artifacts.rglob("*.*"):
        copy = tmp_path / "broken" / path.relative_to(tied.artifacts)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path / "broken"


@pytest.mark.parametrize("file", ["fusion/parameters.bin", "state.pt", "fusion/eval_model.onnx"])
def test_damaged_artifacts(file: str, broken: Path, tmp_path: Path) -> None:
    data = bytearray((broken / file).read_bytes())
    data[len(data) // 2] ^= 1
    to = tmp_path / ("model.onnx" if file.endswith("onnx") else "model.pt")
    for wrong in (bytes(data), bytes(data[:-1])):
        (broken / file).write_bytes(wrong)
        with pytest.raises(ModelError, match=f"{file} is damaged or was swapped"):
            merge(broken, to)
    (broken / file).unlink()
    with pytest.raises(ModelError, match=f"{file} cannot be read"):
        merge(broken, to)
    assert not to.exists()


def test_other_manifests(broken: Path, tmp_path: Path) -> None:
    to = tmp_path / "model.pt"
    with pytest.raises(ModelError, match="no artifacts at"):
        merge(tmp_path / "nowhere", to)
    path = broken / "manifest.json"
    value = json.loads(path.read_bytes())
    path.write_text(json.dumps({**value, "state": None}))
    with pytest.raises(ModelError, match="how their PyTorch model was made; export the model ag"):
        merge(broken, to)
    path.write_text(json.dumps({**value, "format_version": 3}))
    with pytest.raises(ModelError, match=r"format_version 3.*install a newer petalfl"):
        merge(broken, to)
    del value["state"]  # as it was before there was one
    path.write_text(json.dumps(value))
    assert ModelManifest.load(broken).state is None
