"""The control plane's protocol, and who calls it.

gRPC with mutual TLS; a message is a JSON object in UTF-8, so that no code is generated. Who calls
is told by the certificate alone, see `roster`. Caller and server must be of one major and minor
version of Fedveil. gRPC is imported on use: the command line answers without it.
"""

import json
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from pydantic import Field

from ..config import ConfigError, FedveilError, Options, read_toml
from .kit import Kit, KitRole, open_kit
from .roster import Role

Message = dict[str, Any]

SERVICE = "fedveil.Control"
FLEET_SERVICE = "fedveil.Fleet"
"""In the health service: whether sites reach the server."""
VERSION_KEY = "fedveil-version"
LARGEST_MESSAGE = 1 << 20
CHUNK = 1 << 19
"""Bytes of a file in one message, where they stand in base64."""
HEARTBEAT = 10.0
"""Seconds after which a stream that has nothing to say says so."""
_SILENCE = 45.0
_DEADLINE = 60.0
_ROOM = 1 << 16
"""gRPC's own limit is so much higher: what is too long for us is refused by us, and logged."""
_WRONG_CALL = {
    "INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "FAILED_PRECONDITION", "UNAUTHENTICATED",
}  # fmt: skip

TRANSPORT = (
    ("grpc.max_receive_message_length", LARGEST_MESSAGE + _ROOM),
    ("grpc.max_send_message_length", LARGEST_MESSAGE + _ROOM),
)
"""Channel options of both ends."""


class UnreachableError(FedveilError):
    """The server does not answer, or not any more; it may come back."""


class NoRequest(Options):
    """Asks for nothing in particular."""


class RunRequest(Options):
    """Asks about a run."""

    run: str = Field(pattern=r"^[0-9a-f]{16}$")


class WatchRequest(RunRequest):
    """Asks for a run's events from a byte of `events.jsonl` on."""

    offset: int = Field(0, ge=0, lt=1 << 62)


class SubmitRequest(Options):
    """Asks for a run: its configuration by section, and its schema."""

    config: dict[str, Any]
    schema_: dict[str, Any] = Field(alias="schema")


@dataclass(frozen=True)
class Method:
    """What may be asked of the server.

    Attributes:
        roles: Who may.
        request: What a request holds.
        streams: Whether many messages answer it.
        changes: Whether it changes anything.
    """

    roles: tuple[Role, ...]
    request: type[Options] = NoRequest
    streams: bool = False
    changes: bool = False


_READERS: tuple[Role, ...] = ("operator", "auditor")
METHODS: Mapping[str, Method] = {
    "submit": Method(("operator",), SubmitRequest, changes=True),
    "cancel": Method(("operator",), RunRequest, changes=True),
    "resume": Method(("operator",), RunRequest, changes=True),
    "list": Method(_READERS),
    "watch": Method(_READERS, WatchRequest, streams=True),
    "fetch": Method(_READERS, RunRequest, streams=True),
    "roster": Method((*_READERS, "site")),
    "status": Method((*_READERS, "site")),
}


def our_version() -> str:
    """The version of Fedveil that is installed."""
    return metadata.version("fedveil")


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as it travels.

    Raises:
        ConfigError: It is too long.
    """
    data = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    if len(data) > LARGEST_MESSAGE:
        raise ConfigError(f"message: has {len(data)} bytes, at most {LARGEST_MESSAGE} may travel")
    return data


def decode(data: bytes) -> Message:
    """Reads a message.

    Raises:
        ConfigError: It is too long, or no JSON object.
    """
    if len(data) > LARGEST_MESSAGE:
        raise ConfigError(f"message: has {len(data)} bytes, at most {LARGEST_MESSAGE} may travel")
    try:
        message = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise ConfigError("message: is no JSON object")
    return message


def member_kit(folder: Path) -> Kit:
    """Opens the kit of one who looks at runs: an operator's or an auditor's.

    Raises:
        ConfigError: It is neither, or not whole: of a key that is none gRPC would say so in many
            lines of its own, or end the process.
    """
    role: KitRole = "operator"
    path = folder / "kit.toml"
    if path.is_file() and read_toml(path).get("role") == "auditor":
        role = "auditor"
    return open_kit(folder, role)


class ControlClient:
    """Calls the server; a context manager."""

    def __init__(self, kit: Kit, *, version: str | None = None) -> None:
        """Calls with a member's kit.

        Args:
            kit: Whose certificate says who calls.
            version: Of Fedveil; the installed one by default.

        Raises:
            ConfigError: The kit is not whole.
        """
        import grpc

        self._kit = kit
        self._metadata = ((VERSION_KEY, version or our_version()),)
        try:
            authority = kit.ca.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{kit.ca}: cannot be read ({error.strerror}); take the whole kit"
            ) from None
        credentials = grpc.ssl_channel_credentials(
            root_certificates=authority,
            private_key=kit.private_key(),
            certificate_chain=kit.certificate(),
        )
        options = (
            *TRANSPORT,
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.enable_retries", 0),
        )
        self._channel = grpc.secure_channel(kit.control, credentials, options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up."""
        self._channel.close()

    def call(
        self, method: str, request: Mapping[str, Any] | None = None, deadline: float = _DEADLINE
    ) -> Message:
        """Asks, and returns the answer.

        Args:
            method: One of `METHODS` that does not stream.
            request: What for.
            deadline: Seconds to wait.

        Raises:
            UnreachableError: The server does not answer.
            ConfigError: It refuses.
            FedveilError: It failed.
        """
        import grpc

        ask = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            return decode(ask(encode(request or {}), timeout=deadline, metadata=self._metadata))
        except grpc.RpcError as error:
            self._tell(error, f"did not answer within {deadline:g} s")

    def stream(
        self, method: str, request: Mapping[str, Any] | None = None, silence: float = _SILENCE
    ) -> Iterator[Message]:
        """Asks, and yields what comes until the server ends it.

        Args:
            method: One of `METHODS` that streams.
            request: What for.
            silence: Seconds without a message after which the server counts as gone.

        Raises:
            UnreachableError: The server does not answer, or went silent.
            ConfigError: It refuses.
            FedveilError: It failed.
        """
        import grpc

        ask = self._channel.unary_stream(f"/{SERVICE}/{method}")
        answers = ask(encode(request or {}), metadata=self._metadata)
        try:
            while True:
                timer = threading.Timer(silence, answers.cancel)
                timer.daemon = True
                timer.start()
                try:
                    data = next(answers)
                except StopIteration:
                    return
                except grpc.RpcError as error:
                    self._tell(error, f"sent nothing for {silence:g} s")
                finally:
                    timer.cancel()
                yield decode(data)
        finally:
            answers.cancel()

    def _tell(self, error: Any, silent: str) -> NoReturn:  # noqa: ANN401
        """A gRPC error as one of ours, on one line."""
        name, details = error.code().name, error.details() or ""
        where = f"the server at {self._kit.control}"
        if name == "UNAVAILABLE":
            raise _unavailable(self._kit, details) from None
        if name in {"DEADLINE_EXCEEDED", "CANCELLED"}:
            raise UnreachableError(f"{where}: {silent}; is it up?") from None
        if name == "UNIMPLEMENTED":
            raise ConfigError(
                f"{where}: does not know this call; install its version of Fedveil"
            ) from None
        if name == "RESOURCE_EXHAUSTED" or name in _WRONG_CALL:
            raise ConfigError(details or f"{where}: refuses ({name})") from None
        raise FedveilError(details or f"{where}: failed ({name})") from None


def _unavailable(kit: Kit, details: str) -> FedveilError:
    """Why nothing came of a call: gRPC does not say it so that one could act on it."""
    gone = f"{kit.control}: the connection was lost ({' '.join(details.split())[:200]})"
    if "failed to connect" not in details:
        return UnreachableError(gone)
    context = ssl.create_default_context(cafile=str(kit.ca))
    context.set_alpn_protocols(["h2"])
    address = (kit.about.server, kit.about.control_port)
    try:
        with (
            socket.create_connection(address, 5) as plain,
            context.wrap_socket(plain, server_hostname=kit.about.server),
        ):
            pass
    except ssl.SSLCertVerificationError as error:
        return ConfigError(
            f"{kit.control}: is not the server of federation {kit.about.federation} "
            f"({error.verify_message}); check the kit's server and control_port"
        )
    except (ssl.SSLError, ConnectionResetError):
        pass  # it asks for a certificate, which this look has not
    except OSError as error:
        return UnreachableError(
            f"{kit.control}: cannot be reached ({error.strerror or error}); is the server up, and "
            f"port {kit.about.control_port} open?"
        )
    # The server proved who it is, and still hung up: on our certificate.
    return ConfigError(
        f"{kit.control}: does not accept the certificate of {kit.about.role} {kit.name} (expired, "
        "or of another authority); ask the authority for a new one"
    )


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)
