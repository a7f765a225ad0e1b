"""`python -m server`: the aggregator of one federation."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import secrets
import signal
import sys
from pathlib import Path

from aiohttp import web

from petalfl import mqtt
from petalfl.errors import PetalError
from petalfl.files import write_atomic
from petalfl.model import OPTIMIZERS, ModelManifest
from petalfl.schema import read
from petalfl.training import Hyperparameters

from .broker import Broker, open_broker
from .config import SCHEMES, Config, ConfigError, private_blocks
from .federation import Federation
from .gateway import Gateway
from .state import ServerState
from .web import WebApp

RUNTIME_FILE = "server.json"  # where the running server is, for programs that start one


def main(arguments: list[str] | None = None) -> int:
    """Runs the server until it is stopped; 0 then, 2 when it cannot start."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    try:
        manifest = ModelManifest.load(options.artifacts)
        config = _config(options, manifest)
        asyncio.run(_serve(config, manifest, options))
    except (PetalError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


async def _serve(config: Config, manifest: ModelManifest, options: argparse.Namespace) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, stopped.set)
    async with contextlib.AsyncExitStack() as stack:
        state = ServerState(config.data_dir)
        stack.callback(state.close)
        federation = Federation(config, manifest, state)
        broker = _open_broker(options.broker, config, state)
        await broker.start()
        stack.push_async_callback(broker.close)
        if options.broker.startswith("embedded"):
            state.replace_setting("broker port", str(broker.endpoint.port))
        gateway = await _open_gateway(broker, federation, config)
        stack.push_async_callback(gateway.close)
        stack.callback(federation.close)
        token = options.token or state.setting("token", secrets.token_urlsafe(24))
        app = WebApp(federation, state, broker, gateway, token).build()
        url = await _listen(app, options.http, stack)
        federation.start(gateway)
        runtime = {"url": url, "token": token, "pid": os.getpid()}
        write_atomic(config.data_dir / RUNTIME_FILE, json.dumps(runtime).encode())
        stack.callback((config.data_dir / RUNTIME_FILE).unlink, missing_ok=True)
        print(_welcome(manifest, config, broker, url, token), flush=True)
        await stopped.wait()
    print(f"stopped; the state is kept in {config.data_dir}: start again to go on", flush=True)


def _open_broker(spec: str, config: Config, state: ServerState) -> Broker:
    if spec == "embedded":  # on its old port, if any, so that devices find it after a restart
        port = state.setting("broker port", "")
        spec = f"embedded:{port}" if port else spec
    return open_broker(spec, data_dir=config.data_dir, federation=config.federation)


async def _open_gateway(broker: Broker, federation: Federation, config: Config) -> Gateway:
    transport = mqtt.MqttTransport(
        broker.endpoint, login=broker.server_login, client_id=f"{config.federation}-server"
    )
    await transport.connect()
    gateway = Gateway(transport, config.federation, federation.manifest, federation)
    await gateway.open()
    return gateway


async def _listen(app: web.Application, address: str, stack: contextlib.AsyncExitStack) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--http {address!r}: expected HOST:PORT, e.g. 127.0.0.1:8080")
    runner = web.AppRunner(app, handle_signals=False)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, host, int(port))
    try:
        await site.start()
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address}: {error.strerror}; choose another --http HOST:PORT"
        ) from error
    bound = runner.addresses[0][1]
    return f"http://{host}:{bound}"


def _welcome(manifest: ModelManifest, config: Config, broker: Broker, url: str, token: str) -> str:
    frozen = [b.name for b in manifest.blocks if b.is_frozen]
    shared = [b.name for b in manifest.blocks if b.name not in (*config.private_blocks, *frozen)]
    rounds = f"{config.num_rounds} rounds" if config.num_rounds else "rounds until stopped"
    return "\n".join(
        [
            f"petalfl serves federation {config.federation!r} of model {manifest.name!r}",
            f"  shared     {', '.join(shared) or 'nothing'}",
            f"  private    {', '.join(config.private_blocks) or 'nothing'}",
            *([f"  frozen     {', '.join(frozen)}"] if frozen else []),
            f"  rounds     {rounds}, each with at least {config.min_devices} devices",
            f"  http       {url}",
            f"  broker     {broker.endpoint}",
            f"  data       {config.data_dir}",
            "join with",
            f"  EdgeClient({url!r}, token={token!r}, …)",
            f"  python -m examples.android_sim --server {url} --token {token}",
        ]
    )


def _config(options: argparse.Namespace, manifest: ModelManifest) -> Config:
    for name, is_right, expected in (
        ("min-devices", options.min_devices >= 1, "at least 1"),
        ("rounds", options.rounds >= 0, "at least 0"),
        ("seed", options.seed >= 0, "at least 0"),
        ("deadline", 0 < options.deadline < float("inf"), "seconds above 0"),
        ("learning-rate", options.learning_rate != 0, "more than 0"),
    ):
        if not is_right:
            found = getattr(options, name.replace("-", "_"))
            raise ConfigError(f"--{name}: found {found:g}, expected {expected}")
    if options.schedule == "cosine" and not options.rounds:
        raise ConfigError("--schedule cosine needs --rounds; choose --schedule constant")
    names = [field.name for field in dataclasses.fields(Hyperparameters)]
    try:  # by the schema that the devices' tasks are read with
        hyperparameters = read(Hyperparameters, {n: getattr(options, n) for n in names}, "-")
    except ValueError as error:
        name, _, reason = str(error).removeprefix("-.").partition(":")
        raise ConfigError(f"--{name.replace('_', '-')}:{reason}") from error
    return Config(
        artifacts=options.artifacts,
        data_dir=options.data_dir,
        federation=options.federation,
        private_blocks=private_blocks(options.scheme, manifest),
        num_rounds=options.rounds,
        min_devices=options.min_devices,
        deadline_s=options.deadline,
        hyperparameters=hyperparameters,
        schedule=options.schedule or ("cosine" if options.rounds else "constant"),
        seed=options.seed,
        server_optimizer=f"momentum:{options.server_momentum}",
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serve a federation: enroll devices, run rounds, average each shared block "
        "over the devices that hold it. Ctrl-C stops it; a second start goes on.",
        epilog="example: python -m server --artifacts artifacts --rounds 60 --min-devices 3",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--artifacts", type=Path, required=True, metavar="DIR", help="made by python -m export")
    add(
        "--data-dir",
        type=Path,
        default=Path("petalfl-data"),
        metavar="DIR",
        help="devices, journal and block versions; kept over restarts",
    )
    add("--http", default="127.0.0.1:8080", metavar="HOST:PORT", help="port 0: any free one")
    add(
        "--broker",
        default="embedded",
        metavar="SPEC",
        help="embedded, embedded:PORT, or mqtt(s)://user:password@host:port of a Mosquitto with "
        "its dynamic-security plugin",
    )
    add("--federation", default="default", metavar="NAME", help="a-z, 0-9 and '-'")
    add("--token", default="", help="join token; the default is random and kept in --data-dir")
    group = parser.add_argument_group("rounds").add_argument
    group(
        "--scheme",
        default="",
        metavar="{" + ",".join(SCHEMES) + "}",
        help="what is shared: fm all, ph all but the heads, phf encoders, local nothing; the "
        "default is the manifest's private_blocks. Frozen blocks are never sent",
    )
    group("--rounds", type=int, default=0, metavar="N", help="0: until stopped")
    group(
        "--min-devices",
        type=int,
        default=1,
        metavar="N",
        help="a round starts when so many devices are ready",
    )
    group(
        "--deadline",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds after which a round closes with what has arrived",
    )
    group("--server-momentum", type=float, default=0.0, metavar="BETA", help="FedAvgM, per block")
    group = parser.add_argument_group("local training").add_argument
    group(
        "--optimizer",
        choices=OPTIMIZERS,
        default="sgd",
        help="of the devices, with a state that is fresh each round",
    )
    group("--learning-rate", type=float, default=0.05, metavar="LR", help="adamw wants about 0.001")
    group(
        "--schedule",
        choices=("constant", "cosine"),
        default=None,
        help="of the learning rate across rounds; the default is cosine with --rounds",
    )
    group("--momentum", type=float, default=0.9, help="of sgd")
    group("--nesterov", action="store_true", help="look ahead along the momentum of sgd")
    group("--beta1", type=float, default=0.9, help="of adamw")
    group("--beta2", type=float, default=0.999, help="of adamw")
    group("--epsilon", type=float, default=1e-8, metavar="EPS", help="of adamw")
    group("--weight-decay", type=float, default=1e-5, help="of sgd (L2) or adamw (decoupled)")
    group(
        "--max-grad-norm",
        type=float,
        default=0.0,
        metavar="NORM",
        help="clip the gradient of all of a device's blocks together to this norm; 0: never",
    )
    group(
        "--proximal-mu",
        type=float,
        default=0.0,
        metavar="MU",
        help="FedProx: pull shared blocks towards the start of the round; 0: off",
    )
    group("--batch-size", type=int, default=16, metavar="N", help="examples per step")
    group(
        "--accumulation",
        type=int,
        default=1,
        metavar="N",
        help="compute each batch in N parts, one after another, to save memory",
    )
    group("--epochs", type=int, default=1, metavar="N", help="per round")
    group("--seed", type=int, default=0, metavar="N", help="of shuffling and dropout")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info",
        help="of the log on stderr")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
