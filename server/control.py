"""The control plane: `python -m fedveil.server.control KIT`.

Every call goes the same way: whose certificate it is, by the roster as it is now; whether that role
may; whether the versions fit; a line in the audit log; then the call itself. The health service of
gRPC stands on the same port, for members too.
"""

import hashlib
import logging
import os
import signal
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from ..config import ConfigError, FedveilError, validated
from ..deployment.control import (
    METHODS,
    SERVICE,
    TRANSPORT,
    VERSION_KEY,
    Message,
    decode,
    encode,
    our_version,
)
from ..deployment.kit import Kit, open_kit
from ..deployment.logs import configure, level_asked
from ..deployment.roster import Member
from . import calls
from .audit_log import AuditLog
from .gate import Gate, RefusedError, refuse_role, refuse_version
from .health import follow_fleet, health_service
from .queue import Queue

log = logging.getLogger(__name__)

AUDIT_LOG = "audit.jsonl"
_WORKERS = 48
_STREAMS = 32
_STREAMS_EACH = 8
_CAUSE = 1000  # characters of an error that travel: headers are short


@dataclass(frozen=True)
class Call:
    """A call that was let in.

    Attributes:
        name: Of the method.
        member: Who calls.
        request: What for, checked.
        about: What the audit log says that it is about.
    """

    name: str
    member: Member
    request: Any
    about: str


class ControlPlane:
    """All that the calls share."""

    def __init__(self, kit: Kit, stream: calls.Stream | None = None) -> None:
        """Opens the queue, the roster and the audit log of a server's kit.

        Args:
            kit: The server's.
            stream: How often streams look and speak.

        Raises:
            FedveilError: One of them is damaged.
        """
        kit.state.mkdir(parents=True, exist_ok=True)
        self.kit, self.gate, self.queue = kit, Gate(kit), Queue(kit.state)
        self.audit_log = AuditLog(kit.state / AUDIT_LOG)
        self.stopping = threading.Event()
        self._stream = stream or calls.Stream(wait=self.stopping.wait, check=lambda: None)
        self._lock = threading.Lock()
        self._streams: Counter[str] = Counter()
        self._known: set[tuple[str, str, int]] = set()
        self._refused: set[tuple[str, ...]] = set()

    def unary(self, name: str) -> Callable[[bytes, Any], bytes]:
        """The handler of a method with one answer."""

        def handler(data: bytes, context: Any) -> bytes:  # noqa: ANN401
            answer = b""
            with self._admitted(name, data, context) as call:
                answer += encode(self._answer(call))
            return answer

        return handler

    def streaming(self, name: str) -> Callable[[bytes, Any], Iterator[bytes]]:
        """The handler of a method with many answers."""

        def handler(data: bytes, context: Any) -> Iterator[bytes]:  # noqa: ANN401
            with self._admitted(name, data, context) as call, self._slot(call.member.name):
                for message in self._answers(call, context):
                    yield encode(message)

        return handler

    @contextmanager
    def _admitted(self, name: str, data: bytes, context: Any) -> Iterator[Call]:  # noqa: ANN401
        """Lets a call in or refuses it, and notes either; the call ends with its first error."""
        who, role, about = fingerprint(context), "", ""
        try:
            member = self.gate.holder(who)
            who, role = member.name, member.role
            refuse_role(name, member)
            refuse_version(_sent_version(context))
            request = validated(METHODS[name].request, decode(data))
            about = _about(name, request, data)
            self._note(member, name, about)
        except FedveilError as error:
            self._end(context, (who, role, name, about), f"refused: {error}", error)
        try:
            yield Call(name, member, request, about)
        except FedveilError as error:
            self._end(context, (who, role, name, about), f"failed: {error}", error)
        except Exception as error:
            if not context.is_active():  # the caller hung up, which is no fault
                raise
            log.exception("%s of %s", name, who)
            kind = type(error).__name__
            told = FedveilError(f"{name}: {kind} at the server; its log says more")
            self._end(context, (who, role, name, about), f"failed: {kind}", told)

    def _end(
        self,
        context: Any,  # noqa: ANN401
        call: tuple[str, str, str, str],
        outcome: str,
        error: FedveilError,
    ) -> NoReturn:
        """Notes how a call ended that came to nothing, and tells the caller."""
        log.warning("%s of %s: %s", call[2], call[0], outcome)
        with suppress(FedveilError):
            if call[1] or self._is_new((*call, outcome)):
                self.audit_log.append(*call, outcome)
        _abort(context, error)

    def _is_new(self, refusal: tuple[str, ...]) -> bool:
        """Whether one who is no member is refused so for the first time.

        A site that was revoked asks on and on; it must not fill the log, which is never cut.
        """
        with self._lock:
            known = refusal in self._refused
            self._refused.add(refusal)
        return not known

    def _note(self, member: Member, name: str, about: str) -> None:
        """An entry before anything is done; what a site asks every minute is noted once."""
        key = (member.certificate, name, self.gate.roster().version)
        with self._lock:
            if key in self._known:
                return
            self.audit_log.append(member.name, member.role, name, about, "allowed")
            if name in {"roster", "status"}:
                self._known.add(key)

    def _answer(self, call: Call) -> Message:
        match call.name:
            case "list":
                return calls.listed(self.queue)
            case "roster":
                return calls.handed_roster(self.kit)
            case "status":
                return calls.status(self.queue, self.kit)
            case "submit":
                roster = self.gate.roster()
                config, schema = call.request.config, call.request.schema_
                found = calls.submit(self.queue, roster, call.member, config, schema)
                return {**found, **self._receipt(call, f"run {found['run']}, {call.about}")}
            case "cancel":
                self.queue.cancel(call.request.run, call.member.name)
            case "resume":
                self.queue.resume(call.request.run, call.member.name)
        return {"run": call.request.run, **self._receipt(call, call.about)}

    def _receipt(self, call: Call, about: str) -> Message:
        """Notes what was done; whoever keeps the answer can hold the log to it."""
        member = call.member
        entry = self.audit_log.append(member.name, member.role, call.name, about, "done")
        return {"receipt": {"entry": entry.number, "hash": entry.hash}}

    def _answers(self, call: Call, context: Any) -> Iterator[Message]:  # noqa: ANN401
        gone = threading.Event()
        if not context.add_callback(gone.set):
            gone.set()

        def wait(seconds: float) -> bool:
            return self.stopping.wait(0) or gone.wait(seconds) or self.stopping.is_set()

        def check() -> None:
            self.gate.holder(call.member.certificate)

        stream = replace(self._stream, wait=wait, check=check)
        if call.name == "watch":
            yield from calls.watch(self.queue, call.request.run, call.request.offset, stream)
        else:
            yield from calls.fetch(self.queue, call.request.run, call.member, stream)
        if self.stopping.is_set():
            raise RefusedError("UNAVAILABLE", "the server is going down")

    def open_streams(self, name: str) -> int:
        """How many streams a member has open."""
        with self._lock:
            return self._streams[name]

    @contextmanager
    def _slot(self, name: str) -> Iterator[None]:
        """A stream holds a thread for as long as it lasts; one member cannot take them all."""
        with self._lock:
            full = self._streams.total() >= _STREAMS or self._streams[name] >= _STREAMS_EACH
            if not full:
                self._streams[name] += 1
        if full:
            raise RefusedError("RESOURCE_EXHAUSTED", "too many streams are open; close others")
        try:
            yield
        finally:
            with self._lock:
                self._streams[name] -= 1


@dataclass(frozen=True)
class Serving:
    """A control plane that answers.

    Attributes:
        plane: What it answers from.
        port: Where.
    """

    plane: ControlPlane
    port: int
    _server: Any

    def stop(self, grace: float = 2.0) -> None:
        """Ends open streams, then everything."""
        self.plane.stopping.set()
        self._server.stop(grace).wait()


def serve(kit: Kit, listen: str | None = None, stream: calls.Stream | None = None) -> Serving:
    """Starts the control plane.

    Args:
        kit: The server's.
        listen: ADDRESS:PORT; by default the kit's port on all addresses.
        stream: How often streams look and speak.

    Raises:
        ConfigError: The port is taken, or the kit is not whole.
        FedveilError: The state is damaged.
    """
    import grpc
    from grpc_health.v1 import health_pb2_grpc

    plane = ControlPlane(kit, stream)
    options = (
        *TRANSPORT,
        ("grpc.so_reuseport", 0),  # or a second server would get every other call
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_permit_without_calls", 1),
    )
    server = grpc.server(ThreadPoolExecutor(_WORKERS, "control"), options=options)
    server.add_generic_rpc_handlers((_handlers(plane),))
    health = health_service(lambda context: _refuse_stranger(plane, context))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    address = listen or f"0.0.0.0:{kit.about.control_port}"
    try:
        port = server.add_secure_port(address, _credentials(kit))
    except RuntimeError:
        raise ConfigError(
            f"control_port = {address.rpartition(':')[2]}: cannot be listened on, another process "
            "has it (or it needs rights); stop that one, or choose another port in kit.toml"
        ) from None
    server.start()
    follower = threading.Thread(target=follow_fleet, args=(kit, health, plane.stopping))
    follower.daemon = True
    follower.start()
    return Serving(plane, port, server)


def fingerprint(context: Any) -> str:  # noqa: ANN401
    """SHA-256 of the certificate (DER) that a caller proved to hold; TLS lets nobody in without."""
    pem = context.auth_context().get("x509_pem_cert", [b""])[0].decode("ascii")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def _handlers(plane: ControlPlane) -> Any:  # noqa: ANN401
    """Requests and answers are bytes to gRPC: what is no message of ours is refused by us."""
    import grpc

    handlers = {
        name: grpc.unary_stream_rpc_method_handler(plane.streaming(name))
        if method.streams
        else grpc.unary_unary_rpc_method_handler(plane.unary(name))
        for name, method in METHODS.items()
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _credentials(kit: Kit) -> Any:  # noqa: ANN401
    import grpc

    try:
        pair = ((kit.keys / "server.key").read_bytes(), kit.certificate())
        authority = kit.ca.read_bytes()
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return grpc.ssl_server_credentials(
        [pair], root_certificates=authority, require_client_auth=True
    )


def _refuse_stranger(plane: ControlPlane, context: Any) -> None:  # noqa: ANN401
    try:
        plane.gate.holder(fingerprint(context))
    except FedveilError as error:
        _abort(context, error)


def _sent_version(context: Any) -> str:  # noqa: ANN401
    found: Mapping[str, Any] = dict(context.invocation_metadata())
    return str(found.get(VERSION_KEY, ""))


def _about(name: str, request: Any, data: bytes) -> str:  # noqa: ANN401
    """What a call is about: its run, or a digest of what was submitted."""
    if name == "submit":
        return f"sha256 {hashlib.sha256(data).hexdigest()}"
    return f"run {request.run}" if hasattr(request, "run") else ""


def _abort(context: Any, error: FedveilError) -> NoReturn:  # noqa: ANN401
    """Ends a call with a status that the caller's side turns into the same error."""
    import grpc

    code = "INVALID_ARGUMENT" if isinstance(error, ConfigError) else "ABORTED"
    name = error.code if isinstance(error, RefusedError) else code
    context.abort(grpc.StatusCode[name], " ".join(str(error).split())[:_CAUSE])
    raise error  # not reached: abort raises


def main(arguments: list[str]) -> int:
    """Serves until SIGTERM or SIGINT.

    Returns:
        The exit code.
    """
    configure("control", level_asked())
    # gRPC refuses a handshake by itself, without a certificate or with another authority's. It
    # writes a line on stderr on each, unless the environment makes it quiet.
    for variable in ("GRPC_VERBOSITY", "GLOG_minloglevel"):
        os.environ.pop(variable, None)
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    try:
        if len(arguments) != 1:
            raise ConfigError("usage: python -m fedveil.server.control KIT")
        kit = open_kit(Path(arguments[0]), "server")
        serving = serve(kit)
    except FedveilError as error:
        log.error("%s", error)
        return error.exit_code
    log.info("fedveil %s: control plane of %s on port %d", our_version(), kit.name, serving.port)
    done.wait()
    serving.stop()
    log.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
