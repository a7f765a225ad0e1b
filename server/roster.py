"""The devices that are ready, what is known of them, and whom to ask for what."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from petalfl.codecs import parse_codec
from petalfl.model import Block
from petalfl.payloads import max_payload_bytes
from petalfl.wire import BlockUpdate, Report

from .config import Config
from .negotiation import choose_codec
from .selection import Candidate, parse_selection
from .uploads import Upload, choose_uploads

Blocks = frozenset[str]


class Roster:
    """Devices come and go; what is known of them stays.

    Args:
        blocks: Those that are shared.
        known: By device, its record of former runs.

    Attributes:
        ready: By device that can take a task, the shared blocks that it holds.
        codecs: By device, the kinds of codecs that it knows.
    """

    def __init__(self, blocks: Mapping[str, Block], known: Mapping[str, Candidate]) -> None:
        self.ready: dict[str, Blocks] = {}
        self.codecs: dict[str, Collection[str]] = {}
        self._blocks = blocks
        self._known = dict(known)
        self._asked_at_s: dict[str, float] = {}
        self._sent: dict[str, dict[str, tuple[int, float]]] = {}  # last round, norm of the delta

    def choose(self, round_num: int, config: Config) -> dict[str, Blocks]:
        """The cohort of a round: by device, the blocks that it is to send.

        Of ``cohort_size`` devices ``over_selection`` times as many are asked, as far as there are
        so many. The draw depends on the seed, the round and the candidates alone.
        """
        candidates = {
            device: replace(self._known.get(device, Candidate(blocks)), blocks=blocks)
            for device, blocks in self.ready.items()
        }
        wanted = math.ceil((config.cohort_size or len(candidates)) * config.over_selection)
        size = min(wanted, len(candidates))
        rng = np.random.default_rng([config.seed, round_num])
        chosen = parse_selection(config.selection)(candidates, size, round_num, rng)
        return {d: self.uploads(d, round_num, config) for d in self.ready if d in chosen}

    def uploads(self, device: str, round_num: int, config: Config) -> Blocks:
        """The blocks that a device is to send: all that it holds, or those its budget has room for.

        A block's impact is the norm of the delta that the device last sent of it; where it never
        has, the greatest norm of its other blocks.
        """
        held = self.ready[device]
        if not config.max_upload_bytes:
            return held
        sent = self._sent.get(device, {})
        most = max((norm for _, norm in sent.values()), default=1.0)
        codec = parse_codec(self.codec(device, config))
        last = {block: sent.get(block, (0, most)) for block in held}
        uploads = {
            block: Upload(
                max_payload_bytes(codec, self._blocks[block]), norm, round_num - last_round
            )
            for block, (last_round, norm) in last.items()
        }
        return frozenset(choose_uploads(uploads, config.max_upload_bytes))

    def codec(self, device: str, config: Config) -> str:
        """What the device is to encode its updates with."""
        return choose_codec(config.codec, self.codecs.get(device, ()))

    def note_asked(self, device: str, round_num: int, now_s: float) -> None:
        """The device was sent a task in that round."""
        before = self._known.get(device, Candidate(frozenset()))
        self._asked_at_s[device] = now_s
        self._known[device] = replace(
            before, num_selected=before.num_selected + 1, last_round=round_num
        )

    def note_report(self, device: str, report: Report, now_s: float) -> None:
        """The device has done its task."""
        before = self._known.get(device, Candidate(frozenset()))
        asked_at_s = self._asked_at_s.pop(device, None)
        self._known[device] = replace(
            before,
            num_reported=before.num_reported + 1,
            loss=report.loss,
            num_examples=report.num_examples,
            duration_s=before.duration_s if asked_at_s is None else now_s - asked_at_s,
        )

    def note_sent(self, update: BlockUpdate) -> None:
        """The device's update of a block counts."""
        sent = self._sent.setdefault(update.device, {})
        sent[update.block] = (update.round_num, update.encoded.norm)
