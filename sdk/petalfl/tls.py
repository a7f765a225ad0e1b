"""TLS: whom a program believes, how it shows who it is, and what a failed handshake means.

Certificates and host names are always checked; nothing here turns that off.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import ssl
from dataclasses import dataclass
from typing import TypeAlias

log = logging.getLogger("petalfl.tls")
FilePath: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Tls:
    """The files of a TLS client, all PEM.

    Attributes:
        ca: Certificates of the authorities to trust, instead of the system's.
        certificate: The program's own, with the chain to its authority, for a server that asks for
            one (mutual TLS).
        key: Its private key, not encrypted; left out where ``certificate`` holds it, too.
    """

    ca: FilePath | None = None
    certificate: FilePath | None = None
    key: FilePath | None = None

    def context(self) -> ssl.SSLContext:
        """Reads the files: TLS 1.2 or newer, with certificates and host names checked.

        Raises:
            ValueError: A file is missing or holds something else.
        """
        if self.key is not None and self.certificate is None:
            raise ValueError(f"found the key {self.key} without its certificate")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which checks both
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.ca is None:
            context.load_default_certs()
        else:
            trust(context, self.ca)
        if self.certificate is not None:
            show(context, self.certificate, self.key)
        return context

    def renew(self, context: ssl.SSLContext) -> None:
        """Reads the files again, for the connections to come.

        Where they cannot be used, everything stays as it is, and the log says so. An authority
        that has gone stays trusted: OpenSSL forgets none.
        """
        if self == Tls():
            return
        try:
            self.context()  # or a wrong key would leave half of each
        except ValueError as error:
            log.warning("the certificates in use stay: %s", error)
            return
        if self.ca is not None:
            trust(context, self.ca)
        if self.certificate is not None:
            show(context, self.certificate, self.key)


def is_loopback(host: str) -> bool:
    """Whether what is sent there stays on this machine, and needs no TLS."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def trust(context: ssl.SSLContext, ca: FilePath) -> None:
    """Trusts the authorities in a file.

    Raises:
        ValueError: It is missing or holds no certificates.
    """
    try:
        context.load_verify_locations(ca)
    except OSError as error:
        raise ValueError(f"no certificates of authorities in {ca}: {_why(error)}") from error


def show(context: ssl.SSLContext, certificate: FilePath, key: FilePath | None) -> None:
    """Shows a certificate to the other side from now on, and proves it with its key.

    Raises:
        ValueError: A file is missing or holds something else, the key is of another certificate,
            or is encrypted.
    """
    try:
        context.load_cert_chain(certificate, key, _refuse_encrypted)
    except (OSError, _EncryptedError) as error:
        where = f"{certificate}" if key is None else f"{certificate} with {key}"
        raise ValueError(f"no certificate with its key in {where}: {_why(error)}") from error


class _EncryptedError(Exception):
    def __str__(self) -> str:
        return "the key is encrypted, expected one without a passphrase"


def _refuse_encrypted() -> str:
    raise _EncryptedError  # else OpenSSL asks for a passphrase on the terminal


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return _FILE_ERRORS.get(error.reason, "found something else than PEM")
    return str(getattr(error, "strerror", None) or error)


_FILE_ERRORS = {"KEY_VALUES_MISMATCH": "the key is of another certificate"}

# By OpenSSL's number of the failed check: X509_V_ERR_… in openssl/x509_vfy.h.
_UNKNOWN_AUTHORITY = (
    "its certificate is of no authority that is trusted here: give the CA that signed it"
)
_UNTRUSTED = {
    9: "its certificate is not valid yet; is the clock right?",
    10: "its certificate has expired; it needs a new one, unless the clock is wrong",
    **dict.fromkeys((2, 18, 19, 20, 21), _UNKNOWN_AUTHORITY),
}
# What a client reads into the answer of a server that speaks no TLS.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST")


def explain(error: object, tls: Tls) -> str:
    """What went wrong on a connection with TLS, as far as can be told, and what to do.

    Args:
        error: What was raised; other errors come out as they are.
        tls: What the connection was made with.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return _UNTRUSTED.get(error.verify_code, f"its certificate: {error.verify_message}")
    reason = str(error.reason) if isinstance(error, ssl.SSLError) else ""
    if reason in _NO_TLS:
        return f"it speaks no TLS on this port ({reason})"
    if isinstance(error, TimeoutError) and "handshake" in str(error):
        return "it does not answer a TLS handshake; has it TLS on this port?"
    _, is_alert, alert = reason.partition("_ALERT_")
    if not is_alert and not isinstance(error, _HUNG_UP):
        return str(error)
    found = alert.replace("_", " ").lower() if is_alert else "it hung up"  # many say no more
    if tls.certificate is None:
        return f"{found}; it may ask for a certificate (mutual TLS): give one, with its key"
    return f"{found}; it may not accept {tls.certificate}: is it expired, or of another authority?"


_HUNG_UP = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, ssl.SSLEOFError)
