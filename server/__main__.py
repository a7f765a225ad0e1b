"""`python -m server`: the aggregator of one federation, or of several."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import traceback

from petalfl.errors import PetalError

from . import provision
from .config import make_broker_tls, make_tls
from .config_report import as_json, as_text
from .descriptors import raise_limit
from .maintenance import add_commands
from .memory import keep_freed_memory
from .options import add_flags
from .service import load_models, serve
from .settings import resolve
from .stepping import is_stepping


def main(arguments: list[str] | None = None) -> int:
    """Runs the server until it is stopped; 0 then, 2 when it cannot start."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (PetalError, ValueError) as error:
        return _report(error)


def _serve(options: argparse.Namespace) -> int:
    effective = resolve(vars(options), os.environ)
    logging.basicConfig(
        level=effective.server["log_level"].value.upper(),
        format="%(asctime)s %(levelname)s %(message)s",
    )
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    keep_freed_memory()
    raise_limit()
    models = load_models(effective)
    try:
        asyncio.run(serve(effective, models, lambda: resolve(vars(options), os.environ)))
    except BaseException as error:
        if is_stepping():
            _leave(_report(error))
        raise
    if is_stepping():
        _leave(0)
    return 0


def _report(error: BaseException) -> int:
    """Says what was wrong, an operator's mistake without a traceback; the exit code."""
    if isinstance(error, (PetalError, ValueError)):
        print(f"error: {error}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1


def _leave(code: int) -> None:
    """Ends the process with a step in it, for which Python would wait however long it takes.

    Nothing is lost: the state is closed to it, and what it was made of is in the journal.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check_config(options: argparse.Namespace) -> int:
    effective = resolve(vars(options), os.environ)
    configs = {name: model.config for name, model in load_models(effective).items()}
    make_tls(effective.server)
    make_broker_tls(effective.server)
    print(as_json(effective, configs) if options.json else as_text(effective, configs))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serve a federation: enroll devices, run rounds, average each shared block "
        "over the devices that hold it. Ctrl-C stops it; a second start goes on. Settings come "
        "from server.toml, then from PETALFL_SERVER_* in the environment, then from flags. "
        "SIGHUP makes a running server read them again.",
        epilog="example: python -m server --artifacts artifacts --rounds 60 --min-devices 3",
    )
    add_flags(parser)
    parser.set_defaults(run=_serve)
    commands = parser.add_subparsers(title="instead of serving", metavar="COMMAND")
    check = commands.add_parser(
        "check-config",
        help="show every setting, and where its value comes from",
        description="Show what would be served, with every setting and where it comes from.",
    )
    add_flags(check)
    check.add_argument("--json", action="store_true", help="as JSON")
    check.set_defaults(run=_check_config)
    add_commands(commands)
    provision.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
