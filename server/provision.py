"""`python -m server enroll`: an identity for a device that cannot enroll itself.

It asks the running server over HTTP, as a device would, with the join token; where that server is
and its token stand in its data folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from petalfl.errors import EnrollError
from petalfl.mqtt import Endpoint
from petalfl.provisioning import write_identity_file
from petalfl.tls import Tls
from petalfl.ways import open_way

from .options import BY_KEY
from .service import DEFAULT_NAME, RUNTIME_FILE


def add_command(subparsers: Any) -> None:
    """Adds the command to a parser's; it sets ``run``, which returns the exit code."""
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
    parser.add_argument("--federation", default="", metavar="NAME", help="the default is the first")
    parser.add_argument(
        "--data-dir", default=BY_KEY["data_dir"].default, type=Path, metavar="DIR",
        help="of the server that runs on this machine",
    )  # fmt: skip
    parser.add_argument("--url", default="", metavar="URL", help="instead, wherever it runs")
    parser.add_argument("--token", default="", help="its join token, with --url")
    parser.add_argument("--ca", type=Path, metavar="FILE", help="whom to trust, with https")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.out.exists():
        raise ValueError(f"{options.out} is there already; an identity is of one device")
    url, token, federation = options.url, options.token, options.federation or DEFAULT_NAME
    if not url:
        url, token, federation = _running(options.data_dir, options.federation)
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


def _try(path: Path) -> None:
    """Whether a file can be written there; none is left."""
    try:
        path.touch(0o600, exist_ok=False)
        path.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def _running(data_dir: Path, federation: str) -> tuple[str, str, str]:
    """URL, join token and federation of the server that runs on a data folder."""
    path = data_dir / RUNTIME_FILE
    try:
        runtime = json.loads(path.read_bytes())
    except OSError as error:
        raise EnrollError(
            f"no server runs on {data_dir}: start one, or give --data-dir, or --url and --token"
        ) from error
    tokens: dict[str, str] = runtime["tokens"]
    federation = federation or next(iter(tokens))
    if federation not in tokens:
        raise EnrollError(f"found federation {federation!r}, it serves {', '.join(tokens)}")
    return runtime["url"], tokens[federation], federation
