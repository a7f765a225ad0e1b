"""HTTP: enrollment, artifacts, block versions, status and metrics.

Every path but ``/healthz`` wants a credential: the join token (``Authorization: Bearer``) for
enrollment and for everything about the federation, a device's own (``Basic``) for what that
device downloads. Manifest and block versions open with either.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hmac
import json
import logging
import re
import secrets
import sqlite3
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar
from urllib.parse import urlsplit

from aiohttp import web

from petalfl.errors import ModelError, PetalError
from petalfl.schema import Limit, Name, plain, read
from petalfl.store import Identity

from .broker import Broker
from .catalog import Catalog, NotHeldError, NotServedError
from .federation import Federation
from .gateway import Gateway
from .metrics import Source, metrics_text
from .ranges import send_file
from .state import ServerState

log = logging.getLogger("petalfl.server.web")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
DeviceHandler = Callable[[web.Request, str], Awaitable[web.StreamResponse]]
MAX_REQUEST_BYTES = 64 * 1024
KEY_HEADER = "Idempotency-Key"  # of an enrollment, whose answer may be lost
KEY_REGEX = "[A-Za-z0-9_-]{22,128}"  # of 128 bits or more
NO_TOKEN = "wrong or no token; the server printed it at start"


@dataclass(frozen=True, slots=True)
class ModalitiesRequest:
    """What an enrolled device has by now."""

    modalities: Annotated[tuple[Name, ...], Limit(1, 64)]


@dataclass(frozen=True, slots=True)
class EnrollRequest:
    """The body of an enrollment."""

    device: Name
    modalities: Annotated[tuple[Name, ...], Limit(1, 64)]


@dataclass(frozen=True, slots=True)
class RevokeRequest:
    """Whose enrollment ends."""

    device: Name


R = TypeVar("R", EnrollRequest, ModalitiesRequest)


class WebApp:
    """The handlers of one federation's HTTP API, over the objects that they show."""

    def __init__(
        self,
        federation: Federation,
        state: ServerState,
        broker: Broker,
        gateway: Gateway,
        token: str,
        admin_token: str = "",
    ) -> None:
        self._federation = federation
        self._state = state
        self._broker = broker
        self._gateway = gateway
        self.token, self._admin_token = token, admin_token
        self.name = federation.config.federation
        self._started_s = time.monotonic()
        self._catalog = Catalog(federation, state)
        self._enrolling = asyncio.Lock()
        self.siblings: Sequence[WebApp] = ()
        self.source = Source(federation, state, gateway)

    def routes(self) -> list[web.RouteDef]:
        """Everything below the federation's own path."""
        root = f"/v1/{self.name}"
        return [
            web.post(f"{root}/enroll", self._for_operator(self._enroll)),
            web.post(f"{root}/revoke", self._for_admin(self._revoke)),
            web.post(f"{root}/modalities", self._for_device(self._add_modalities)),
            web.get(f"{root}/status", self._for_operator(self._status)),
            web.get(f"{root}/rounds", self._for_operator(self._rounds)),
            web.get(f"{root}/devices", self._for_operator(self._devices)),
            web.get(f"{root}/session", self._for_device(self._session)),
            web.get(f"{root}/manifest", self._for_both(self._file)),
            web.get(f"{root}/artifacts/{{path:.+}}", self._for_device(self._file)),
            web.get(f"{root}/blocks", self._for_both(self._versions)),
            web.get(
                f"{root}/blocks/{{block}}/{{version:[0-9]{{1,15}}}}", self._for_both(self._file)
            ),
        ]

    def has_device(self, name: str) -> bool:
        """Whether a device of that name is enrolled here: on one broker a name is one device."""
        return self._state.modalities(name) is not None

    # Who asks

    def is_operator(self, request: web.Request) -> bool:
        """Whether the request has this federation's token."""
        return _has_token(request, self.token)

    def _for_admin(self, handler: Handler) -> Handler:
        """Who reads the server's data folder: apps have the join token, too."""

        async def checked(request: web.Request) -> web.StreamResponse:
            if not self._admin_token or not _has_token(request, self._admin_token):
                raise web.HTTPUnauthorized(text="only on the server's own machine")
            return await handler(request)

        return checked

    def _for_operator(self, handler: Handler) -> Handler:
        async def checked(request: web.Request) -> web.StreamResponse:
            if not self.is_operator(request):
                raise web.HTTPUnauthorized(text=NO_TOKEN)
            return await handler(request)

        return checked

    def _for_device(self, handler: DeviceHandler) -> Handler:
        async def checked(request: web.Request) -> web.StreamResponse:
            kind, _, given = request.headers.get("Authorization", "").partition(" ")
            try:
                text = base64.b64decode(given, validate=True).decode() if kind == "Basic" else ""
            except ValueError:  # no base64, or no UTF-8 in it
                text = ""
            device, _, password = text.partition(":")
            if not self._state.is_password(device, password):
                raise web.HTTPUnauthorized(
                    text="this device is not enrolled here, or its credential was revoked"
                )
            self._refuse_cut_off(device)
            return await handler(request, device)

        return checked

    def _for_both(self, handler: DeviceHandler) -> Handler:
        """An operator, too, as the device "", which holds every block."""
        as_device = self._for_device(handler)
        as_operator = self._for_operator(lambda request: handler(request, ""))

        async def checked(request: web.Request) -> web.StreamResponse:
            kind, _, _ = request.headers.get("Authorization", "").partition(" ")
            return await (as_operator if kind == "Bearer" else as_device)(request)

        return checked

    # For devices

    async def _enroll(self, request: web.Request) -> web.Response:
        wanted = await self._read(request, EnrollRequest, "enrollment")
        modalities = sorted(set(wanted.modalities))
        async with self._enrolling:
            password = self._make_password(wanted.device, request.headers.get(KEY_HEADER, ""))
            is_taken = any(one.has_device(wanted.device) for one in self.siblings)
            is_new = not is_taken and self._state.add_device(
                wanted.device, password, modalities, time.time()
            )
            if not is_new and not self._state.is_password(wanted.device, password):
                raise web.HTTPConflict(
                    text=f"device {wanted.device} is enrolled already; use its own store, "
                    "or another name"
                )
            self._refuse_cut_off(wanted.device)
            try:
                await self._broker.grant(wanted.device, password, self.name)
            except PetalError as error:
                if is_new:
                    self._state.remove_device(wanted.device)
                raise web.HTTPServiceUnavailable(text=str(error)) from error
        config = self._federation.config
        identity = Identity(
            self.name, wanted.device, password, config.private_blocks, config.private_tensors
        )
        log.info("enrolled %s with %s", wanted.device, ", ".join(modalities))
        reply = plain(identity)
        if not identity.private_tensors:
            del reply[
                "private_tensors"
            ]  # a device that knows of none takes part where there are none
        return web.json_response(reply)

    def _refuse_cut_off(self, device: str) -> None:
        if self._state.is_cut_off(device):
            raise web.HTTPForbidden(
                text=f"device {device} was cut off, as it sent in vain without end; once it is "
                f"mended, python -m server revoke {device} lets it enroll again"
            )

    async def _revoke(self, request: web.Request) -> web.Response:
        """Ends a device's logins; what it has sent so far counts."""
        try:
            device = read(RevokeRequest, await request.json(), "revocation").device
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        async with self._enrolling:
            if not self.has_device(device):
                raise web.HTTPNotFound(text=f"device {device} is not enrolled in {self.name}")
            await self._broker.revoke(device)
            self._state.remove_device(device)
        self._federation.remove(device)
        self._gateway.forget(device)
        log.warning("device %s is revoked", device)
        return web.json_response({"device": device})

    def _make_password(self, device: str, key: str) -> str:
        """At random; with a key of the device's the same until it is revoked."""
        if not key:
            return secrets.token_urlsafe(32)
        if not re.fullmatch(KEY_REGEX, key):
            raise web.HTTPBadRequest(text=f"{KEY_HEADER}: expected 22 to 128 of A-Za-z0-9_-")
        secret = self._state.setting("enrollment secret", secrets.token_urlsafe(32))
        named = f"{device} {key}"
        if num_revoked := self._state.num_revoked(device):
            named += f" {num_revoked}"
        digest = hmac.digest(secret.encode(), named.encode(), "sha256")
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()

    async def _add_modalities(self, request: web.Request, device: str) -> web.Response:
        wanted = await self._read(request, ModalitiesRequest, "modalities")
        known = self._state.modalities(device) or []
        modalities = sorted({*known, *wanted.modalities})
        if modalities != known:
            self._state.set_modalities(device, modalities)
            log.info("%s now has %s", device, ", ".join(modalities))
        return web.json_response({"modalities": modalities})

    async def _read(self, request: web.Request, cls: type[R], where: str) -> R:
        """The body, whose modalities the model has."""
        try:
            found = read(cls, await request.json(), where)
            self._federation.shared.held_with(found.modalities)
        except (ValueError, RecursionError, ModelError) as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        return found

    async def _session(self, request: web.Request, device: str) -> web.Response:
        endpoint = self._broker.device_endpoint(_asked_host(request))
        return web.json_response(
            {
                "mqtt_host": endpoint.host,
                "mqtt_port": endpoint.port,
                "mqtt_is_tls": endpoint.is_tls,
            }
        )

    async def _file(self, request: web.Request, device: str) -> web.StreamResponse:
        try:
            path = request.path.removeprefix(f"/v1/{self.name}/")
            file = await self._catalog.find(device, path)
        except NotServedError as error:
            raise web.HTTPNotFound(text=str(error)) from error
        except NotHeldError as error:
            raise web.HTTPForbidden(text=str(error)) from error
        return await send_file(request, file, functools.partial(self._catalog.sent, device, file))

    async def _versions(self, request: web.Request, device: str) -> web.Response:
        return web.json_response(self._federation.shared.versions)

    # For operators

    async def _status(self, request: web.Request) -> web.Response:
        federation = self._federation
        federation.flush_traffic()
        current = federation.round
        return web.json_response(
            {
                "federation": federation.config.federation,
                "model": federation.manifest.name,
                "round_num": federation.round_num,
                "num_rounds": federation.config.num_rounds,
                "is_round_open": current is not None,
                "is_finished": federation.finished.is_set(),
                "cohort_size": len(current.cohort) if current else 0,
                "num_reports": len(current.reports) if current else 0,
                "devices_enrolled": len(self._state.devices()),
                "devices_ready": len(federation.roster.ready),
                "shared_blocks": federation.shared.versions,
                "private_blocks": federation.config.private_blocks,
                "private_tensors": federation.config.private_tensors,
                "frozen_blocks": [b.name for b in federation.manifest.blocks if b.is_frozen],
                "mode": federation.config.mode,
                "updates_refused": dict(federation.refused),
                "uptime_s": time.monotonic() - self._started_s,
                **self._state.history.totals(),
            }
        )

    async def _rounds(self, request: web.Request) -> web.Response:
        since = request.query.get("since", "0")
        if not re.fullmatch(r"\d{1,18}", since, re.ASCII):
            raise web.HTTPBadRequest(text=f"since={since!r}, expected the number of a round")
        return web.json_response(self._state.history.rounds(int(since)))

    async def _devices(self, request: web.Request) -> web.Response:
        self._federation.flush_traffic()
        traffic = self._state.history.device_traffic()
        return web.json_response(
            {
                name: {
                    "modalities": modalities,
                    "is_ready": name in self._federation.roster.ready,
                    "blocks": traffic[name],
                }
                for name, modalities in self._state.devices().items()
            }
        )


def _has_token(request: web.Request, token: str) -> bool:
    kind, _, given = request.headers.get("Authorization", "").partition(" ")
    found = given.encode(errors="surrogateescape")
    return hmac.compare_digest(found, token.encode()) and kind == "Bearer"


def _asked_host(request: web.Request) -> str:
    """The name by which the client knows this server."""
    try:
        host = urlsplit(f"//{request.host}").hostname
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"the request's Host is {request.host!r}") from error
    return host or ""


def build_app(apps: Sequence[WebApp]) -> web.Application:
    """One application for several federations; each token opens its own."""
    app = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[_errors_as_text])
    for one in apps:
        one.siblings = [other for other in apps if other is not one]
        app.add_routes(one.routes())

    async def healthz(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def metrics(request: web.Request) -> web.Response:
        shown = [one.source for one in apps if one.is_operator(request)]
        if not shown:
            raise web.HTTPUnauthorized(text=NO_TOKEN)
        return web.Response(body=metrics_text(shown), content_type="text/plain")

    app.add_routes([web.get("/healthz", healthz), web.get("/metrics", metrics)])
    return app


@web.middleware
async def _errors_as_text(request: web.Request, handler: Handler) -> web.StreamResponse:
    """One line of text for what a request did wrong; a log entry for what we did."""
    try:
        return await handler(request)
    except web.HTTPException:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise web.HTTPBadRequest(text=f"no JSON: {error}") from error
    except (PetalError, sqlite3.Error) as error:  # the disk is full, say
        log.error("%s %s failed: %s", request.method, request.path, error)
        raise web.HTTPServiceUnavailable(text=str(error)) from error
