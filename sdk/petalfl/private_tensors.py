"""Private tensors: parts of a shared block that stay on the device, as FedBN's batch norms do.

The block is trained, sent and averaged as one vector all the same: before its delta becomes an
update the private coordinates are set to 0, and where a version comes down the device puts its own
values back. A tensor is named ``BLOCK/TENSOR``, its own name being that of the manifest's layout.

Source:
    Li et al. 2021 (FedBN), arXiv:2102.07623.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from petalfl.errors import ModelError
from petalfl.model import Block, ModelManifest
from petalfl.vectors import Vector


def tensors_of(block: Block) -> dict[str, slice]:
    """By ``BLOCK/TENSOR``: where it lies in the block's vector; statistics included."""
    places, start = dict[str, slice](), 0
    for tensor in block.tensors:
        places[f"{block.name}/{tensor.name}"] = slice(start, start + tensor.size)
        start += tensor.size
    return places


def check_tensors(manifest: ModelManifest, names: Collection[str]) -> None:
    """Refuses a model in which a private tensor would no longer be found, and so be sent.

    Raises:
        ModelError: It lacks one of those names.
    """
    known = {name for block in manifest.blocks for name in tensors_of(block)}
    if unknown := sorted(set(names) - known):
        raise ModelError(
            f"the tensor {unknown[0]} is private on this device, and the model has none of that "
            "name; enroll anew with a store of its own"
        )


def withhold(block: Block, names: Collection[str], delta: Vector) -> Vector:
    """The delta with 0 at the private coordinates: what may leave the device."""
    kept = [place for name, place in tensors_of(block).items() if name in names]
    if not kept:
        return delta
    shared: Vector = delta.copy()
    for place in kept:
        shared[place] = 0
    return shared


def private_values(block: Block, names: Collection[str], vector: Vector) -> dict[str, Vector]:
    """By name: what the block's private tensors hold."""
    return {name: vector[place] for name, place in tensors_of(block).items() if name in names}


def put_back(block: Block, own: Mapping[str, Vector], vector: Vector) -> Vector:
    """A block's vector with the device's own values of its private tensors.

    Args:
        own: By name, of any blocks; a tensor that is not among them stays as it came.

    Raises:
        ModelError: A value is not of its tensor's size.
    """
    places = {name: place for name, place in tensors_of(block).items() if name in own}
    if not places:
        return vector
    personal: Vector = vector.copy()
    for name, place in places.items():
        if own[name].size != place.stop - place.start:
            raise ModelError(
                f"the private tensor {name} has {own[name].size} values here, the model's "
                f"{place.stop - place.start}"
            )
        personal[place] = own[name]
    return personal
