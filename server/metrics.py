"""`/metrics`: what federations show to Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)

from .federation import Federation
from .gateway import Gateway
from .reducer import active
from .state import ServerState


class Source(NamedTuple):
    """Where a federation's numbers are."""

    federation: Federation
    state: ServerState
    gateway: Gateway


def metrics_text(sources: Iterable[Source]) -> bytes:
    """The metrics of some federations, in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(list(sources)))
    return generate_latest(registry)


_GAUGES = {
    "petalfl_round": "Open or last round",
    "petalfl_devices_ready": "Devices ready",
    "petalfl_devices_at_work": "Devices with a task, within its deadline",
    "petalfl_devices_enrolled": "Devices enrolled",
}
_BY_BLOCK = {
    "petalfl_block_version": "Newest version of a shared block",
    "petalfl_block_buffered": "Updates that wait for the block's next version",
    "petalfl_block_holders": "Ready devices that hold the block",
}


class _Collector:
    def __init__(self, sources: list[Source]) -> None:
        self._sources = sources

    def collect(self) -> list[Metric]:
        """Called by prometheus_client."""
        gauges = {
            n: GaugeMetricFamily(n, text, labels=["federation"]) for n, text in _GAUGES.items()
        }
        blocks = {
            n: GaugeMetricFamily(n, text, labels=["block", "federation"])
            for n, text in _BY_BLOCK.items()
        }
        messages = _counter("petalfl_refused_messages", "Messages refused, by reason", "reason")
        refused = _counter("petalfl_refused_updates", "Updates that did not count, by kind", "kind")
        accepted = _counter("petalfl_updates_accepted", "Block updates accepted")
        dropped = _counter("petalfl_updates_dropped", "Updates that went into no version")
        traffic = _counter("petalfl_block_bytes", "Bytes of updates and downloads", "direction")
        for federation, state, gateway in self._sources:
            name = federation.config.federation
            for metric, value in _numbers(federation, state).items():
                gauges[metric].add_metric([name], value)
            for metric, values in _block_numbers(federation).items():
                for block, value in values.items():
                    blocks[metric].add_metric([block, name], value)
            for family, counts in ((messages, gateway.refused), (refused, federation.refused)):
                for reason, count in counts.items():
                    family.add_metric([reason, name], count)
            federation.flush_traffic()
            totals = state.history.totals()
            accepted.add_metric([name], totals["updates_accepted"])
            dropped.add_metric([name], totals["updates_dropped"])
            traffic.add_metric(["up", name], totals["bytes_up"])
            traffic.add_metric(["down", name], totals["bytes_down"])
        info = InfoMetricFamily("petalfl_reducer", "What sums the updates up")
        info.add_metric([], {"backend": active().name, "description": active().description})
        counters = (info, messages, refused, accepted, dropped, traffic)
        return [*gauges.values(), *blocks.values(), *counters]


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, labels=[*labels, "federation"])


def _numbers(federation: Federation, state: ServerState) -> dict[str, int]:
    open_round = federation.round
    return {
        "petalfl_round": federation.round_num,
        "petalfl_devices_ready": len(federation.roster.ready),
        "petalfl_devices_at_work": open_round.num_open if open_round else 0,
        "petalfl_devices_enrolled": len(state.devices()),
    }


def _block_numbers(federation: Federation) -> dict[str, dict[str, int]]:
    open_round, held = federation.round, list(federation.roster.ready.values())
    names = federation.shared.blocks
    return {
        "petalfl_block_version": federation.shared.versions,
        "petalfl_block_buffered": {
            name: len(open_round.buffers[name]) if open_round else 0 for name in names
        },
        "petalfl_block_holders": {name: sum(name in one for one in held) for name in names},
    }
