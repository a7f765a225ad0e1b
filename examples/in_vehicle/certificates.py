"""An authority of the federation's own and what it signs, with the commands of docs/tls.md."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from petalfl import PetalError


class Certificate(NamedTuple):
    """Files, all PEM; ``ca`` is who signed it."""

    ca: Path
    certificate: Path
    key: Path


def make_certificates(folder: Path, units: Iterable[str]) -> dict[str, Certificate]:
    """Makes an authority, and a certificate for ``server`` on this machine and for each unit.

    Raises:
        PetalError: There is no OpenSSL 3, or it refuses.
    """
    folder.mkdir(parents=True)
    authority = Certificate(folder / "ca.crt", folder / "ca.crt", folder / "ca.key")
    _request(authority, "our fleet", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    signed = {}
    for name in ("server", *units):
        signed[name] = Certificate(authority.ca, folder / f"{name}.crt", folder / f"{name}.key")
        hosts = ("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")
        _request(
            signed[name], name, "-CA", authority.certificate, "-CAkey", authority.key,
            "-addext", "basicConstraints=critical,CA:FALSE", *(hosts if name == "server" else ()),
        )  # fmt: skip
    return signed


def _request(to: Certificate, name: str, *arguments: str | Path) -> None:
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-days", "30", "-subj", f"/CN={name}", "-keyout", to.key, "-out", to.certificate,
        *arguments,
    ]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise PetalError("openssl is not installed: install OpenSSL 3, or use --no-tls") from error
    except subprocess.CalledProcessError as error:
        raise PetalError(f"openssl failed: {error.stderr.strip()}; use --no-tls") from error
