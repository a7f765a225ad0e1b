"""The server's certificate, of HTTP and the embedded broker alike."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from petalfl.tls import show, trust


@dataclass(frozen=True, slots=True)
class ServerTls:
    """The files of a TLS server, all PEM.

    Attributes:
        certificate: With the chain to its authority.
        key: Its private key; None where ``certificate`` holds it, too.
        client_ca: Mutual TLS: only clients with a certificate of these authorities are let in,
            whatever name is in it. Passwords and tokens are asked for as ever.
    """

    certificate: Path
    key: Path | None = None
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Reads the files: TLS 1.2 or newer.

        Raises:
            ValueError: A file is missing or holds something else.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        show(context, self.certificate, self.key)
        if self.client_ca is not None:
            trust(context, self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def renew(self, context: ssl.SSLContext) -> None:
        """Reads certificate and key again, for the connections to come.

        An authority of ``client_ca`` that has gone stays trusted: OpenSSL forgets none.

        Raises:
            ValueError: As in `context`; then everything stays as it is.
        """
        self.context()  # or a wrong key would leave half of each
        show(context, self.certificate, self.key)
        if self.client_ca is not None:
            trust(context, self.client_ca)
