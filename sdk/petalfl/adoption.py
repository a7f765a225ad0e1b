"""When the server has another model: what was trained of the one before is kept, not deleted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from petalfl.control_variates import with_sum
from petalfl.errors import ModelError
from petalfl.model import ModelManifest
from petalfl.store import DeviceStore, Shared, State


def adopt(
    store: DeviceStore, state: State, manifest: ModelManifest
) -> tuple[State, ModelError | None]:
    """Makes a device's state and its store this model's.

    Private blocks of a model of another layout are set aside in the store, and taken up again when
    that model is back. Its shared blocks and its outbox are dropped: they are the server's.

    Args:
        state: As the store has it.

    Returns:
        The state to go on with, and what to tell the app, if anything.

    Raises:
        StoreError: The disk is full, say; nothing is lost.
    """
    layout = manifest.layout_sha256
    if state.layout == layout or (not state.layout and _is_of(manifest, store, state)):
        return replace(state, layout=layout), None
    told = None
    if kept := sorted(state.private.keys() | state.private_tensors.keys()):
        path = store.set_aside(state)
        names = ", ".join(kept)
        told = ModelError(
            f"the server's model has another layout than the one trained here: the private blocks "
            f"of that one ({names}) are kept in {path}, and are taken up again when it is back"
        )
    found = store.take_up(layout) or State(layout=layout)
    store.write_shared(Shared({}, {}))
    store.write_state(found)
    return found, told


def _is_of(manifest: ModelManifest, store: DeviceStore, state: State) -> bool:
    """Whether a store from before layouts were kept is of this model, as far as one can tell."""
    vectors: Mapping[str, bytes] = {**state.private, **store.read_shared().vectors}
    sizes = {b.name: (4 * b.size, 4 * with_sum(b).size) for b in manifest.blocks}
    return all(len(vector) in sizes.get(name, ()) for name, vector in vectors.items())
