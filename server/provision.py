"""`python -m server enroll` and `revoke`: a device's identity, given and taken back.

Both ask the running server over HTTP. `enroll` does so as a device would, with the join token;
`revoke` has a token of its own, as apps have the join token, too. Where the server is, and its
tokens, stand in its data folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from petalfl.errors import EnrollError
from petalfl.http import HttpClient
from petalfl.mqtt import Endpoint
from petalfl.provisioning import write_identity_file
from petalfl.source import NotThereError
from petalfl.tls import Tls
from petalfl.ways import open_way

from .options import BY_KEY
from .service import DEFAULT_NAME, RUNTIME_FILE


def add_commands(subparsers: Any) -> None:
    """Adds the commands to a parser's; each sets ``run``, which returns the exit code."""
    _add_enroll(subparsers)
    _add_revoke(subparsers)


def _add_enroll(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "enroll",
        help="enroll a device that has no HTTP",
        description="Enroll a device with a running server, and write the file that its app gives "
        "as EdgeClient(..., identity=FILE). It holds the device's password.",
        epilog="example: python -m server enroll watch-7 --modalities acc,gyro --out watch-7.json",
    )
    parser.add_argument("device", metavar="DEVICE", help="a-z, 0-9 and '-', new to the server")
    parser.add_argument(
        "--modalities", required=True, metavar="NAMES", help="those that it has, by commas"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="a new file")
    _add_place(parser)
    parser.add_argument("--url", default="", metavar="URL", help="instead, wherever it runs")
    parser.add_argument("--token", default="", help="its join token, with --url")
    parser.set_defaults(run=_enroll)


def _add_revoke(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "revoke",
        help="end a device's enrollment",
        description="End a device's logins at the server that runs on this machine, over HTTP and "
        "MQTT, at once and for good. What it has sent so far counts; no round waits for it. Its "
        "name is free again: who has the join token can enroll under it, so give the server "
        "another --token where the device must stay out.",
        epilog="example: python -m server revoke watch-7",
    )
    parser.add_argument("device", metavar="DEVICE", help="its name")
    _add_place(parser)
    parser.set_defaults(run=_revoke)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--federation", default="", metavar="NAME", help="the default is the first")
    parser.add_argument(
        "--data-dir", default=BY_KEY["data_dir"].default, type=Path, metavar="DIR",
        help="of the server that runs on this machine",
    )  # fmt: skip
    parser.add_argument("--ca", type=Path, metavar="FILE", help="whom to trust, with https")


def _enroll(options: argparse.Namespace) -> int:
    if options.out.exists():
        raise ValueError(f"{options.out} is there already; an identity is of one device")
    url, token, federation = options.url, options.token, options.federation or DEFAULT_NAME
    if not url:
        running = _running(options.data_dir, options.federation)
        url, token, federation = running.url, running.token, running.federation
    way = open_way(url, federation, Tls(ca=options.ca) if options.ca else None, lambda: None)
    modalities = options.modalities.split(",")
    _try(options.out)  # a name is taken for good, and the password is given once
    identity = way.enroll(token, options.device, modalities)
    write_identity_file(options.out, identity)
    way.log_in(identity)
    session = way.get_session()
    broker = Endpoint(session.mqtt_host, session.mqtt_port, session.mqtt_is_tls)
    print(f"{options.device} is enrolled in {identity.federation!r}; its app says")
    print(f"  EdgeClient({str(broker)!r}, identity={str(options.out)!r}, …)")
    return 0


def _revoke(options: argparse.Namespace) -> int:
    running = _running(options.data_dir, options.federation)
    client = HttpClient(running.url, Tls(ca=options.ca) if options.ca else None)
    client.use_token(running.admin_token)
    path = f"/v1/{running.federation}/revoke"
    try:
        client.post_json(path, {"device": options.device})
    except NotThereError as error:
        raise EnrollError(
            f"device {options.device} is not enrolled in {running.federation!r}"
        ) from error
    print(f"{options.device} is revoked in {running.federation!r}; its name is free again")
    return 0


def _try(path: Path) -> None:
    """Whether a file can be written there; none is left."""
    try:
        path.touch(0o600, exist_ok=False)
        path.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


class _Running(NamedTuple):
    """A server on this machine, and one of its federations."""

    url: str
    federation: str
    token: str
    admin_token: str


def _running(data_dir: Path, federation: str) -> _Running:
    """The server that runs on a data folder."""
    path = data_dir / RUNTIME_FILE
    try:
        runtime = json.loads(path.read_bytes())
    except OSError as error:
        raise EnrollError(
            f"no server runs on {data_dir}: start one, or give --data-dir, or, to enroll, --url "
            "and --token"
        ) from error
    tokens: dict[str, str] = runtime["tokens"]
    federation = federation or next(iter(tokens))
    if federation not in tokens:
        raise EnrollError(f"found federation {federation!r}, it serves {', '.join(tokens)}")
    return _Running(runtime["url"], federation, tokens[federation], runtime.get("admin_token", ""))
