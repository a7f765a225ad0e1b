"""`python -m server check-config`: every setting in force, and where its value comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import Config
from .options import BY_KEY, OPTIONS, PerBlock
from .settings import Effective, Setting, Settings, without_secrets


def as_text(effective: Effective, configs: Mapping[str, Config]) -> str:
    """A table: the server's settings, then those of each federation."""
    lines = ["server", *_table(effective.server, is_of_server=True)]
    for name, settings in effective.federations.items():
        config = configs[name]
        lines += [
            f"federation {name}",
            *_table(settings, is_of_server=False),
            f"  private blocks: {', '.join(config.private_blocks) or 'none'}",
            f"  private tensors: {', '.join(config.private_tensors) or 'none'}",
            f"  schedule: {config.schedule}; server optimizer: {config.server_optimizer}; "
            f"fine-tuning: {_finish_epochs(config)} epochs",
        ]
    return "\n".join(lines)


def _finish_epochs(config: Config) -> int:
    return config.fine_tuning.epochs if config.fine_tuning else 0


def as_json(effective: Effective, configs: Mapping[str, Config]) -> str:
    """The same for programs: ``{"server": {key: {"value", "source"}}, "federations": {…}}``."""
    server = _plain(effective.server, is_of_server=True)
    federations = {
        name: {
            "settings": _plain(settings, is_of_server=False),
            "private_blocks": list(configs[name].private_blocks),
            "private_tensors": list(configs[name].private_tensors),
            "schedule": configs[name].schedule,
            "server_optimizer": configs[name].server_optimizer,
            "finish_epochs": _finish_epochs(configs[name]),
        }
        for name, settings in effective.federations.items()
    }
    return json.dumps({"server": server, "federations": federations}, indent=1)


def _table(settings: Settings, is_of_server: bool) -> list[str]:
    rows = [
        (option.name, _shown(option.key, settings[option.key]), settings[option.key].source)
        for option in OPTIONS
        if option.is_of_server == is_of_server
    ]
    return [f"  {name:<18} {value:<24} {source}" for name, value, source in rows]


def _shown(key: str, setting: Setting) -> str:
    value = without_secrets(key, setting.value)
    if isinstance(value, (list, tuple)):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str("" if value is None else value)


def _plain(settings: Settings, is_of_server: bool) -> dict[str, Any]:
    return {
        key: {"value": _as_json(without_secrets(key, setting.value)), "source": setting.source}
        for key, setting in settings.items()
        if BY_KEY[key].is_of_server == is_of_server
    }


def _as_json(value: Any) -> Any:
    return str(value) if isinstance(value, (Path, PerBlock)) else value
