"""Where the value of every setting comes from.

Rising in priority: the default, ``server.toml``, the environment, the command line. A setting
``min-devices`` is ``min_devices`` in the file, ``PETALFL_SERVER_MIN_DEVICES`` in the environment
and ``--min-devices`` among the flags. Tables ``[federation.NAME]`` of the file are federations
with settings of their own, above those of the file's top.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from petalfl.schema import NAME_REGEX

from .options import BY_KEY, FILE_NAME, OPTIONS, ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

PREFIX = "PETALFL_SERVER_"


class Setting(NamedTuple):
    """A value and where it comes from: ``default``, ``server.toml``, a variable or a flag."""

    value: Any
    source: str


Settings = Mapping[str, Setting]  # by option


class Effective(NamedTuple):
    """All settings as they are in force: the server's, and those of each federation."""

    server: Settings
    federations: Mapping[str, Settings]


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Effective:
    """Puts the sources together.

    Args:
        flags: The parsed arguments; what is no option is ignored.

    Raises:
        ConfigError: A value has another form, or a name is unknown; the message says where.
    """
    path, table = _file(flags, environment)
    tables = table.pop("federation", {}) if isinstance(table.get("federation"), dict) else {}
    above = {**_variables(environment), **_read_flags(flags)}
    base = {**_defaults(), **_read_table(table, str(path), "")}
    server = {**base, **above}
    if not tables:
        return Effective(server, {server["federation"].value: server})
    if server["federation"].source != "default":
        raise ConfigError(f"{server['federation'].source}: {path} names its federations itself")
    federations = {}
    for name, own in tables.items():
        where = f"[federation.{name}] "
        if not isinstance(own, dict):
            raise ConfigError(f"{path}: [federation] {name}: expected a table {where.strip()}")
        if not re.fullmatch(NAME_REGEX, name):
            raise ConfigError(f"{path}: {where}expected a name of a-z, 0-9 and '-'")
        read = _read_table(own, str(path), where)
        if wrong := [key for key in read if BY_KEY[key].is_of_server]:
            raise ConfigError(f"{path}: {where}{wrong[0]} is the whole server's, not one's own")
        folder = {"data_dir": Setting(server["data_dir"].value / name, server["data_dir"].source)}
        federations[name] = {
            **base,
            **folder,
            **read,
            **{k: v for k, v in above.items() if k != "data_dir"},
        }
    return Effective(server, federations)


def _file(flags: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[Path, dict[str, Any]]:
    named = flags.get("config") or environment.get(PREFIX + "CONFIG")
    path = Path(named or FILE_NAME)
    if not named and not path.exists():
        return path, {}
    try:
        return path, tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _defaults() -> dict[str, Setting]:
    return {option.key: Setting(option.default, "default") for option in OPTIONS}


def _variables(environment: Mapping[str, str]) -> dict[str, Setting]:
    found = {}
    for name in environment:
        if name.startswith(PREFIX) and name != PREFIX + "CONFIG":
            key = name.removeprefix(PREFIX).lower()
            found[key] = _read(key, environment[name], name, name)
    return found


def _read_flags(flags: Mapping[str, Any]) -> dict[str, Setting]:
    given = {option.key: f"--{option.name}" for option in OPTIONS if option.key in flags}
    return {key: _read(key, flags[key], flag, flag) for key, flag in given.items()}


def _read_table(table: Mapping[str, Any], path: str, where: str) -> dict[str, Setting]:
    return {key: _read(key, v, path, f"{path}: {where}{key}") for key, v in table.items()}


def _read(key: str, value: Any, source: str, where: str) -> Setting:
    if key not in BY_KEY:
        raise ConfigError(f"{where}: there is no such setting; python -m server --help has them")
    try:
        return Setting(BY_KEY[key].read(value), source)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def without_secrets(key: str, value: Any) -> Any:
    """The value of an option without what opens doors."""
    if key == "token" and value:
        return "set, not shown"
    if key == "broker" and "@" in value:
        return f"{value.partition('://')[0]}://…@{value.rpartition('@')[2]}"
    return value


class Changes(NamedTuple):
    """What new settings come to for a running federation.

    Attributes:
        settings: Those in force from now on.
        taken: By option that has changed: how.
        kept: Those whose new value needs a restart.
    """

    settings: Settings
    taken: dict[str, str]
    kept: dict[str, str]


def take_over(old: Settings, new: Settings) -> Changes:
    """The new value of what can change while the server runs, the old one of the rest."""
    settings, taken, kept = dict(old), dict[str, str](), dict[str, str]()
    for key, setting in new.items():
        if setting.value == old[key].value:
            continue
        if BY_KEY[key].is_reloadable:
            settings[key] = setting
        before, after = (without_secrets(key, one.value) for one in (old[key], setting))
        change = f"{before} → {after} ({setting.source})"
        (taken if BY_KEY[key].is_reloadable else kept)[key] = change
    return Changes(settings, taken, kept)
