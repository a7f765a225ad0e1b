"""The running server: its federations on one broker and one HTTP port, from start to stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import secrets
import signal
import sqlite3
import ssl
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from petalfl import mqtt
from petalfl.errors import PetalError
from petalfl.files import write_atomic
from petalfl.model import ModelManifest
from petalfl.tls import Tls

from . import reducer
from .broker import Broker, open_broker
from .catalog import Catalog
from .config import Config, ConfigError, make_broker_tls, make_config, make_tls
from .downloads import Downloads
from .federation import Federation
from .gateway import Gateway
from .settings import Effective, take_over
from .state import ServerState
from .tls import ServerTls
from .web import WebApp, build_app

log = logging.getLogger("petalfl.server")

DEFAULT_NAME = "default"  # of a federation; the SDK assumes it
STOP_GRACE_S = 2.0  # for answers under way; a download goes on when the server is back
RUNTIME_FILE = "server.json"  # where the running server is, for programs that start one


@dataclass(frozen=True, slots=True)
class Model:
    """What a federation is about: its manifest and its configuration."""

    manifest: ModelManifest
    config: Config


def load_models(effective: Effective) -> dict[str, Model]:
    """By federation.

    Raises:
        ConfigError: A setting is impossible.
        ModelError: The artifacts are missing or damaged.
    """
    models = {}
    for name, settings in effective.federations.items():
        if settings["artifacts"].value is None:
            raise ConfigError("no artifacts: give --artifacts DIR, which python -m export makes")
        manifest = ModelManifest.load(settings["artifacts"].value)
        models[name] = Model(manifest, make_config(name, settings, manifest))
    folders = [model.config.data_dir.resolve() for model in models.values()]
    if len(set(folders)) < len(folders):
        raise ConfigError("two federations have the same data_dir; give each its own")
    return models


async def serve(
    effective: Effective, models: Mapping[str, Model], again: Callable[[], Effective]
) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        again: Reads the settings once more, at SIGHUP.
    """
    tls, broker_tls = make_tls(effective.server), make_broker_tls(effective.server)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, stopped.set)
    async with contextlib.AsyncExitStack() as stack:
        backend = stack.enter_context(reducer.use(_choose_reducer(effective)))
        states, federations = {}, {}
        for name, model in models.items():
            states[name] = ServerState(model.config.data_dir)
            stack.callback(states[name].close)
            federations[name] = Federation(model.config, model.manifest, states[name])
        log.info("updates are summed by %s: %s", backend.name, backend.description)
        names = list(models)
        state = states[names[0]]
        broker = await _open_broker(effective, names, state, (tls, broker_tls), stack)
        gateways: list[Gateway] = []

        def greet() -> None:  # a broker that was started again may have forgotten everything
            for gateway in gateways:
                gateway.publish_versions()

        client_id = f"{names[0]}-server-{secrets.token_hex(8)}"  # whoever knew it could take over
        transport = mqtt.MqttTransport(
            broker.endpoint, login=broker.server_login, client_id=client_id, on_connect=greet,
            tls=broker_tls,
        )  # fmt: skip
        await transport.connect()
        stack.push_async_callback(transport.close)
        apps, admin_token = [], secrets.token_urlsafe(24)
        for name in names:
            federation, state = federations[name], states[name]
            for device in state.all_cut_off():  # a crash, or the broker's, may have left the login
                _end_login(broker, device)
            cut_off = functools.partial(_cut_off, broker, state)
            downloads = Downloads(transport, name, Catalog(federation, state))
            stack.push_async_callback(downloads.close)
            gateway = Gateway(
                transport, name, federation.served, federation, cut_off=cut_off,
                fetch=downloads.fetch,
            )  # fmt: skip
            await gateway.open()
            gateways.append(gateway)
            stack.push_async_callback(gateway.close)
            stack.callback(federation.close)
            token = effective.federations[name]["token"].value
            token = token or state.setting("token", secrets.token_urlsafe(24))
            apps.append(WebApp(federation, state, broker, gateway, token, admin_token))
        certificates = _Certificates(tls, broker)
        address = effective.server["http"].value
        url = await _listen(build_app(apps), address, stack, certificates.context)
        for app in apps:
            app.source.federation.start(app.source.gateway)
        reloading = _Reloading(effective, federations, again, certificates.renew)
        loop.add_signal_handler(signal.SIGHUP, reloading.run)
        _write_runtime(url, apps, admin_token, effective.server["data_dir"].value, stack)
        for app in apps:
            model = models[app.name]
            print(_welcome(model.manifest, model.config, broker, url, app.token), flush=True)
        await stopped.wait()
    kept = ", ".join(str(model.config.data_dir) for model in models.values())
    print(f"stopped; the state is kept in {kept}: start again to go on", flush=True)


def _choose_reducer(effective: Effective) -> reducer.Backend:
    """Before anything arrives: that there is no GPU must not come out in a round."""
    try:
        return reducer.choose(effective.server["reducer"].value)
    except ValueError as error:
        raise ConfigError(f"--reducer: {error}") from error


def _cut_off(broker: Broker, state: ServerState, device: str) -> None:
    """Ends a device's logins, that at the broker in the background."""
    try:
        state.cut_off(device)
    except sqlite3.Error as error:  # the disk is full, say
        log.error("cannot note that device %s is cut off: %s", device, error)
    _end_login(broker, device)


def _end_login(broker: Broker, device: str) -> None:
    _in_background(broker.revoke(device), f"device {device} keeps its login")


def _in_background(work: Coroutine[None, None, None], complaint: str) -> None:
    def say(done: asyncio.Task[None]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            log.error("%s: %s", complaint, error)

    task = asyncio.get_running_loop().create_task(work)
    _BACKGROUND.add(task)  # the loop itself holds tasks only weakly
    task.add_done_callback(_BACKGROUND.discard)
    task.add_done_callback(say)


_BACKGROUND: set[asyncio.Task[None]] = set()


class _Certificates:
    """Those in use: the server's own, if it has one, and what it shows its broker."""

    def __init__(self, tls: ServerTls | None, broker: Broker) -> None:
        self.context = tls.context() if tls else None
        self._tls, self._broker = tls, broker

    def renew(self) -> None:
        """Reads them again for the connections to come; damaged ones are not used."""
        if self._tls is not None and self.context is not None:
            try:
                self._tls.renew(self.context)
            except ValueError as error:
                log.error("the certificate in use stays: %s", error)
                return
            log.info("the certificate is read again from %s", self._tls.certificate)
        _in_background(self._broker.renew_certificate(), "the broker keeps its certificate")


async def _open_broker(
    effective: Effective,
    names: list[str],
    state: ServerState,
    tls: tuple[ServerTls | None, Tls | None],
    stack: contextlib.AsyncExitStack,
) -> Broker:
    """Starts the broker, an embedded one on its old port, if any: devices look for it there."""
    spec = str(effective.server["broker"].value)
    if spec == "embedded" and (port := state.setting("broker port", "")):
        spec = f"embedded:{port}"
    data_dir = effective.server["data_dir"].value
    host, _ = _host_and_port(effective.server["http"].value)
    broker = open_broker(
        spec, data_dir=data_dir, federation=names[0], more=names[1:], host=host, tls=tls[0],
        broker_tls=tls[1],
    )  # fmt: skip
    await broker.start()
    stack.push_async_callback(broker.close)
    if spec.startswith("embedded"):
        state.replace_setting("broker port", str(broker.device_endpoint("").port))
    return broker


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--http {address!r}: expected HOST:PORT, e.g. 127.0.0.1:8080")
    return host, int(port)


async def _listen(
    app: web.Application,
    address: str,
    stack: contextlib.AsyncExitStack,
    context: ssl.SSLContext | None = None,
) -> str:
    host, port = _host_and_port(address)
    runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=STOP_GRACE_S)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, host, port, ssl_context=context)
    try:
        await site.start()
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address}: {error.strerror}; choose another --http HOST:PORT"
        ) from error
    bound = runner.addresses[0][1]
    return f"{'https' if context else 'http'}://{host}:{bound}"


def _write_runtime(
    url: str,
    apps: list[WebApp],
    admin_token: str,
    data_dir: Path,
    stack: contextlib.AsyncExitStack,
) -> None:
    tokens = {app.name: app.token for app in apps}
    runtime = {
        "url": url, "token": apps[0].token, "tokens": tokens, "admin_token": admin_token,
        "pid": os.getpid(),
    }  # fmt: skip
    write_atomic(data_dir / RUNTIME_FILE, json.dumps(runtime).encode())
    stack.callback((data_dir / RUNTIME_FILE).unlink, missing_ok=True)


def _welcome(manifest: ModelManifest, config: Config, broker: Broker, url: str, token: str) -> str:
    frozen = [b.name for b in manifest.blocks if b.is_frozen]
    shared = [b.name for b in manifest.blocks if b.name not in (*config.private_blocks, *frozen)]
    rounds = f"{config.num_rounds} rounds" if config.num_rounds else "rounds until stopped"
    pace = "asynchronous, once" if config.is_async else "each with"
    is_default, tuning = config.federation == DEFAULT_NAME, config.fine_tuning
    name = "" if is_default else f"federation={config.federation!r}, "
    lines = [
        f"petalfl serves federation {config.federation!r} of model {manifest.name!r}",
        f"  shared     {', '.join(shared) or 'nothing'}",
        f"  private    {', '.join((*config.private_blocks, *config.private_tensors)) or 'nothing'}",
        *([f"  frozen     {', '.join(frozen)}"] if frozen else []),
        f"  rounds     {rounds}, {pace} at least {config.min_devices} devices",
        *([f"  finish     {tuning.epochs} epochs of fine-tuning on each device"] if tuning else []),
        f"  http       {url}",
        f"  broker     {broker.device_endpoint(urlsplit(url).hostname or '')}",
        f"  data       {config.data_dir}",
        "join with",
        f"  EdgeClient({url!r}, token={token!r}, {name}…)",
    ]
    if is_default:
        lines.append(f"  python -m examples.android_sim --server {url} --token {token}")
    return "\n".join(lines)


class _Reloading:
    """Takes new settings over at SIGHUP, as far as they can change while the server runs."""

    def __init__(
        self,
        effective: Effective,
        federations: Mapping[str, Federation],
        again: Callable[[], Effective],
        renew_certificates: Callable[[], None] = lambda: None,
    ) -> None:
        self._renew_certificates = renew_certificates
        self._in_force = dict(effective.federations)
        self._federations = federations
        self._again = again

    def run(self) -> None:
        """Reads the settings again; where they are impossible, they all stay as they are.

        The certificates, whose files' names stay, are read again either way.
        """
        self._renew_certificates()
        try:
            new = self._again()
            if new.federations.keys() != self._in_force.keys():
                raise ConfigError("federations come and go with a restart only")
            changes = {n: take_over(s, new.federations[n]) for n, s in self._in_force.items()}
            configs = {
                name: make_config(name, one.settings, self._federations[name].manifest)
                for name, one in changes.items()
            }
        except (PetalError, ValueError) as error:
            log.error("the new settings are not used: %s", error)
            return
        for name, one in changes.items():
            for key, change in one.kept.items():
                log.warning("%s: %s needs a restart and stays: %s", name, key, change)
            for key, change in one.taken.items():
                log.info("%s: %s changes with the next round: %s", name, key, change)
            self._in_force[name] = one.settings
            self._federations[name].reconfigure(configs[name])
        logging.getLogger().setLevel(new.server["log_level"].value.upper())
