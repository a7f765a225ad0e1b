"""The wire: every message between device and server, as bytes and back.

A message is one msgpack map: ``{"v": 2, "t": type, ...fields}``. `decode` is the door: what it
returns is well-formed, and hostile bytes raise `WireError` alone. A block update travels as one
`UpdateManifest`, its chunks, and a `Fin`; only the server's `Receipt` ends it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import msgpack
import numpy as np

from petalfl import payloads
from petalfl.codecs import CODEC_REGEX, parse_codec
from petalfl.errors import WireError
from petalfl.model import MAX_BLOCK_SIZE, Block
from petalfl.schema import Limit, Name, Pattern, Sha256, plain, read
from petalfl.training import Hyperparameters
from petalfl.vectors import Vector

WIRE_VERSION = 2
CHUNK_BYTES = 120 * 1024
MAX_HEADER_BYTES = 2048
MAX_MESSAGE_BYTES = CHUNK_BYTES + MAX_HEADER_BYTES
MAX_TASK_BLOCKS = 128
MAX_FETCH_BYTES = 8 * CHUNK_BYTES

MAX_COUNT = 1 << 40
Count = Annotated[int, Limit(0, MAX_COUNT)]
Positive = Annotated[int, Limit(1, MAX_COUNT)]
UpdateId = Annotated[bytes, Limit(16, 16)]
CodecName = Annotated[str, Pattern(CODEC_REGEX)]
Holders = Annotated[dict[Name, Positive], Limit(0, MAX_TASK_BLOCKS)]
FilePath = Annotated[str, Pattern(r"[A-Za-z0-9._/-]{1,320}")]


@dataclass(frozen=True, slots=True)
class Status:
    """A device's birth (retained) or, as its last will, its death."""

    is_online: bool


@dataclass(frozen=True, slots=True)
class Ready:
    """A device can take a task, now or again after a break; retained.

    Attributes:
        tasks: The model's tasks that it has labels of, and so trains the heads of.
        codecs: The kinds that it can encode with.
    """

    modalities: Annotated[tuple[Name, ...], Limit(1, 64)]
    tasks: Annotated[tuple[Name, ...], Limit(1, 128)]
    codecs: Annotated[tuple[Name, ...], Limit(1, 32)] = ("f32",)


@dataclass(frozen=True, slots=True)
class UpdateManifest:
    """Announces a block update: what it is, how long, and the digest of its payload."""

    update_id: UpdateId
    block: Name
    round_num: Positive
    base_version: Positive
    num_examples: Positive
    codec: CodecName
    num_bytes: Annotated[int, Limit(1, 4 * MAX_BLOCK_SIZE)]
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes ``[index * CHUNK_BYTES, ...)`` of an update's payload."""

    update_id: UpdateId
    index: Annotated[int, Limit(0, 1 << 20)]
    data: Annotated[bytes, Limit(1, CHUNK_BYTES)]


@dataclass(frozen=True, slots=True)
class Fin:
    """All chunks were sent; the server answers with a `Receipt`."""

    update_id: UpdateId


@dataclass(frozen=True, slots=True)
class Report:
    """A device has trained its round. ``loss`` is the mean over its batches."""

    update_id: UpdateId
    round_num: Positive
    num_examples: Positive
    loss: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """The server's word on an update or a report.

    Attributes:
        status: accepted: it is durable; rejected: drop it, for ``reason``; missing: send the
            chunks whose bit in ``missing`` is 1 (bit i of byte i // 8, low bit first), or,
            where ``missing`` is empty, everything from the manifest on.
    """

    update_id: UpdateId
    status: Literal["accepted", "rejected", "missing"]
    reason: Annotated[str, Limit(0, 256)] = ""
    missing: Annotated[bytes, Limit(0, CHUNK_BYTES)] = b""


@dataclass(frozen=True, slots=True)
class BlockVersion:
    """A version of a shared block and the digest of its float32 vector."""

    version: Positive
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Task:
    """Train one round: fetch ``blocks``, train, send deltas.

    Attributes:
        round_num: Of the server's round, or in asynchronous mode of the device's own tasks.
        num_rounds: 0 where no end is planned.
        blocks: The shared blocks of this device, with their base versions.
        seed: Orders the examples and draws the dropout masks.
        uploads: Those of ``blocks`` whose delta is to be sent; None: of all of them.
        codec: What to encode them with, where it can; None: f32, which always may be used.
        num_holders: By block of ``blocks``, where there are control variates: the N of
            `petalfl.control_variates`.
    """

    round_num: Positive
    num_rounds: Count
    hyperparameters: Hyperparameters
    seed: Count
    blocks: Annotated[dict[Name, BlockVersion], Limit(0, MAX_TASK_BLOCKS)]
    uploads: Annotated[tuple[Name, ...], Limit(0, MAX_TASK_BLOCKS)] | None = None
    codec: CodecName | None = None
    num_holders: Holders | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """The last round is over; ``blocks`` are the final versions for this device.

    Attributes:
        hyperparameters: Of the fine-tuning that follows, on the device alone; None: there is none.
        seed: As in `Task`, of the fine-tuning; None: 0.
    """

    blocks: Annotated[dict[Name, BlockVersion], Limit(0, MAX_TASK_BLOCKS)]
    num_holders: Holders | None = None
    hyperparameters: Hyperparameters | None = None
    seed: Count | None = None


@dataclass(frozen=True, slots=True)
class Excuse:
    """A device leaves its task out: it has nothing to train on, say, and will not report."""

    round_num: Positive


@dataclass(frozen=True, slots=True)
class Fetch:
    """A device without HTTP wants bytes ``[offset, offset + num_bytes)`` of a file.

    Attributes:
        path: As below a federation's path in HTTP: ``blocks/head/7``.
        ticket: Of the last `Part` that came, which shows that what was sent arrives.
        known: The digest of what the device has; where it is that still, nothing comes.
    """

    path: FilePath
    offset: Count
    num_bytes: Annotated[int, Limit(1, MAX_FETCH_BYTES)]
    ticket: Annotated[bytes, Limit(0, 8)] = b""
    known: Sha256 | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a file from ``offset`` on: `CHUNK_BYTES`, or what is left of fetch or file.

    Attributes:
        num_bytes: Of the whole file, as ``sha256``.
        ticket: For the next `Fetch`.
    """

    path: FilePath
    sha256: Sha256
    num_bytes: Count
    offset: Count
    ticket: Annotated[bytes, Limit(8, 8)]
    data: Annotated[bytes, Limit(0, CHUNK_BYTES)]


@dataclass(frozen=True, slots=True)
class Declined:
    """Nothing comes of a file: it is what is known, or not there, not the device's, unreadable."""

    path: FilePath
    why: Literal["unchanged", "not-there", "not-held", "failed"]
    reason: Annotated[str, Limit(0, 256)] = ""


Message: TypeAlias = (
    Status
    | Ready
    | UpdateManifest
    | Chunk
    | Fin
    | Report
    | Receipt
    | BlockVersion
    | Task
    | Finish
    | Excuse
    | Fetch
    | Part
    | Declined
)

_TYPES: dict[str, type[Message]] = {
    "status": Status,
    "ready": Ready,
    "update": UpdateManifest,
    "chunk": Chunk,
    "fin": Fin,
    "report": Report,
    "receipt": Receipt,
    "version": BlockVersion,
    "task": Task,
    "finish": Finish,
    "excuse": Excuse,
    "fetch": Fetch,
    "part": Part,
    "declined": Declined,
}
_NAMES = {cls: name for name, cls in _TYPES.items()}


def encode(message: Message) -> bytes:
    """The message as bytes, at most `MAX_MESSAGE_BYTES`; fields that are None are left out.

    Raises:
        ValueError: It is longer, which a message within its schema's limits can only be when it
            names very many blocks.
    """
    known = {name: value for name, value in plain(message).items() if value is not None}
    fields = {"v": WIRE_VERSION, "t": _NAMES[type(message)], **known}
    data: bytes = msgpack.packb(fields, use_bin_type=True)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    return data


def decode(data: bytes) -> Message:
    """The message in ``data``, checked against its schema.

    Raises:
        WireError: Anything else than a well-formed message of this wire version.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {len(data)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    fields = _unpack(data)
    if not isinstance(fields, dict):
        raise WireError(f"expected a map, found {type(fields).__name__}")
    version, name = fields.pop("v", None), fields.pop("t", None)
    if type(version) is not int or version != WIRE_VERSION:
        raise WireError(f"expected wire version {WIRE_VERSION}, found {str(version)[:20]!r}")
    cls = _TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise WireError(f"unknown message type {str(name)[:20]!r}")
    try:
        return read(cls, fields)
    except ValueError as error:
        raise WireError(str(error)) from error


def _unpack(data: bytes) -> Any:
    try:
        # A task with the most blocks has the longest map; nothing else nests deeper than it.
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_array_len=256,
            max_map_len=MAX_TASK_BLOCKS,
            max_str_len=1024,  # bytes: 256 characters at most
            max_bin_len=CHUNK_BYTES,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.UnpackException) as error:
        raise WireError(f"no msgpack message: {error}") from error


def _refuse_extension(code: int, data: bytes) -> Any:
    raise WireError(f"msgpack extension type {code} is not part of the wire")


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """An update that was checked: ``encoded`` is its delta = local - base, and finite."""

    update_id: bytes
    device: str
    block: str
    round_num: int
    base_version: int
    num_examples: int
    encoded: payloads.EncodedDelta
    sha256: str  # of its payload, as announced; empty where that was not kept

    @property
    def delta(self) -> Vector:
        """The delta itself, float32 ``(block.size,)``: expanded anew with every call."""
        return self.encoded.decode()


def check_announced(manifest: UpdateManifest, block: Block) -> None:
    """Refuses an update that announces more or less than one of the block takes.

    Raises:
        WireError: It does.
    """
    try:
        payloads.check_payload_bytes(parse_codec(manifest.codec), manifest.num_bytes, block)
    except WireError as error:
        raise WireError(f"block {manifest.block}: {error}") from error


def decode_payload(
    manifest: UpdateManifest, payload: bytes | memoryview, device: str, block: Block
) -> BlockUpdate:
    """The update in a complete payload.

    Raises:
        WireError: Wrong length or digest, or nothing that its codec can have written.
    """
    if hashlib.sha256(payload).hexdigest() != manifest.sha256:
        raise WireError(f"block {manifest.block}: the payload's sha256 is not the manifest's")
    try:
        encoded = payloads.parse_payload(parse_codec(manifest.codec), block, payload)
    except WireError as error:
        raise WireError(f"block {manifest.block}: {error}") from error
    return BlockUpdate(
        manifest.update_id,
        device,
        manifest.block,
        manifest.round_num,
        manifest.base_version,
        manifest.num_examples,
        encoded,
        manifest.sha256,
    )


def num_chunks(num_bytes: int) -> int:
    """How many chunks a payload of that length travels in."""
    return -(-num_bytes // CHUNK_BYTES)


def split_chunks(update_id: bytes, payload: bytes) -> Iterator[Chunk]:
    """The payload's chunks in order."""
    for index in range(num_chunks(len(payload))):
        start = index * CHUNK_BYTES
        yield Chunk(update_id, index, payload[start : start + CHUNK_BYTES])


def missing_bitmap(missing: set[int], total: int) -> bytes:
    """Bit i is 1 where chunk i of ``total`` is missing: byte i // 8, low bit first."""
    bits = np.zeros(total, np.uint8)
    bits[sorted(missing)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def read_bitmap(bitmap: bytes, total: int) -> set[int]:
    """The inverse of `missing_bitmap`; bits beyond ``total`` are ignored."""
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")[:total]
    return {int(i) for i in np.flatnonzero(bits)}
