"""A site's process: it asks the server for messages and answers them with the installed app.

`python -m fedveil.client.node KIT` goes on until it is told to stop, whatever the server does. It
is Flower's SuperNode and its executor in one: it speaks the Fleet API over outbound HTTPS, listens
nowhere, runs no code but what is installed here, and says why it fails to nobody but its own log.
"""

import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch

from ..config import FedveilError
from ..deployment.control import ControlClient, our_version
from ..deployment.control import UnreachableError as NoControlError
from ..deployment.keys import NODE, read_node
from ..deployment.kit import Kit, open_kit
from ..deployment.logs import configure, level_asked, scrubbed
from ..files import replace_file
from ..flower import ClientApp, Context, Message, RecordDict, set_identity
from ..flower.fleet import (
    Fleet,
    RefusedError,
    UnreachableError,
    bundle_hash,
    error_reply,
    note_of,
    noted,
)
from ..flower.folding import fold, unfold
from ..flower.superlink import deployed_bundle
from ..privacy.noise import Coins
from .app import client_app
from .deployed import open_deployed, read_own, refresh_identities
from .site import Site
from .status import State, Status, write_status

log = logging.getLogger(__name__)

SOON, LATER, SHARE = 0.05, 2.0, 0.05
"""Between two questions is this share of the time since the last message, within these seconds."""
_FIRST_RETRY, _LAST_RETRY = 1.0, 30.0
_IN_HAND = "in-hand.json"
_SESSION = "session.json"


def main(folder: Path) -> int:
    """Serves a site's kit until a signal comes."""
    configure("node", level_asked())
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        kit = open_kit(folder, "site")
        if (threads := read_own(kit).file.site.threads) is not None:
            torch.set_num_threads(threads)
        with closing(open_deployed(kit, Coins.from_system())) as site:
            Node(kit, site, stop).serve()
    except FedveilError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


def pause(idle: float) -> float:
    """Seconds until the next question, after so many without a message."""
    return min(LATER, max(SOON, SHARE * idle))


class Node:
    """A site and its connection, for the life of a process."""

    def __init__(self, kit: Kit, site: Site, stop: threading.Event) -> None:
        """Of a kit and its opened site; it ends when `stop` is set."""
        self._kit, self._site, self._stop = kit, site, stop
        self._app: ClientApp = client_app(lambda _: site)
        self._status = Status("starting", kit.fleet, version=our_version())
        self._known: dict[int, bool] = {}

    def serve(self) -> None:
        """Connects, answers, and connects again, until it is told to stop.

        Raises:
            FedveilError: A key of the kit cannot be used.
        """
        fleet = Fleet(self._kit.fleet, self._kit.ca.read_bytes(), read_node(self._kit.keys / NODE))
        with closing(fleet):
            retry = _FIRST_RETRY
            while not self._stop.is_set():
                self._say("connecting")
                try:
                    self._take_roster()
                    with fleet.session(self._last_session()) as node:
                        self._keep(_SESSION, {**self._noted_session(), "node": node})
                        self._say("connected", last_error="")
                        log.info("connected to %s", self._kit.fleet)
                        retry = _FIRST_RETRY
                        self._answer_all(fleet)
                except Exception as error:
                    log.warning("%s; trying again in %.0f s", told(self._kit, error), retry)
                    log.debug("its cause", exc_info=True)
                    self._say("connecting", last_error=told(self._kit, error))
                    self._stop.wait(retry)
                    retry = min(_LAST_RETRY, 2 * retry)
        self._say("stopped")

    def _answer_all(self, fleet: Fleet) -> None:
        """Answers messages until the session ends."""
        self._answer_for_the_dead(fleet)
        last = time.monotonic()
        while not self._stop.is_set():
            if fleet.lost.is_set():
                raise RefusedError("the session is over")
            asked = time.monotonic()
            message = self._persistently(fleet, fleet.receive)
            if message is None:
                now = time.monotonic()  # the SuperLink may have kept the question for a while
                self._stop.wait(max(0.0, pause(now - last) - (now - asked)))
                continue
            self._keep(_IN_HAND, note_of(message))
            taken = time.monotonic()
            reply = self._answer(fleet, message)
            log.info(
                "answered %s of round %s in %.2f s",
                message.metadata.message_type,
                message.metadata.group_id or "-",
                time.monotonic() - taken,
            )
            try:
                self._persistently(fleet, lambda: fleet.reply(reply))  # noqa: B023  called at once
            except RefusedError as error:
                log.warning(
                    "a reply is not taken (%s): its run is over, or it came too late", error
                )
            self._keep(_IN_HAND, None)
            self._say("connected")
            last = time.monotonic()

    def _answer(self, fleet: Fleet, message: Message) -> Message:
        """The app's reply, or an error without a word."""
        run_id = message.metadata.run_id
        set_identity(run_id, fleet.node_id)
        try:
            if not self._is_ours(fleet, run_id):
                return error_reply(message)
            self._say("working", run=f"{run_id:016x}", round=_round_of(message))
            return self._called(message, Context(run_id, fleet.node_id, {}, RecordDict(), {}))
        except Exception as error:
            log.error("a message failed: %s", type(error).__name__)
            log.debug("its cause", exc_info=True)
            return error_reply(message)

    def _called(self, message: Message, context: Context) -> Message:
        message.content = unfold(message.content)
        reply = self._app(message, context)
        reply.content = fold(reply.content)
        return reply

    def _is_ours(self, fleet: Fleet, run_id: int) -> bool:
        """Whether a run was started with our bundle, which holds no code; others are refused.

        None would be unpacked here. But who starts a run with code in it does not mean well.
        """
        if run_id not in self._known:
            found = self._persistently(fleet, lambda: fleet.bundle(run_id))
            if ours := found == bundle_hash(deployed_bundle()):
                self._take_roster()  # before it is known: what refuses once refuses again
                self._forget_other_runs(fleet, run_id)
            else:
                log.error("refused run %d: it was started with a bundle of its own", run_id)
            self._known[run_id] = ours
        return self._known[run_id]

    def _persistently(self, fleet: Fleet, call: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Calls until the server is there; a computed reply is not thrown away for a hiccup.

        Raises:
            RefusedError: The server refuses, or the session is over.
        """
        retry = SOON
        while True:
            try:
                return call()
            except UnreachableError:
                if fleet.lost.is_set() or self._stop.wait(retry):
                    raise
                retry = min(_LAST_RETRY, 2 * retry)

    def _answer_for_the_dead(self, fleet: Fleet) -> None:
        """What a killed process had in hand is answered with an error: the server may ask again."""
        path = self._kit.state / _IN_HAND
        with suppress(FileNotFoundError, ValueError, TypeError, RefusedError):
            message = noted(json.loads(path.read_text(encoding="utf-8")))
            set_identity(message.metadata.run_id, fleet.node_id)
            log.warning("a message was in hand when the process before this one ended")
            fleet.reply(error_reply(message))
        self._keep(_IN_HAND, None)

    def _take_roster(self) -> None:
        """The newest roster, if the control plane is there; else the site goes on with its own.

        Raises:
            FedveilError: The server refuses this site, or has another version.
        """
        try:
            with ControlClient(self._kit) as control:
                found = control.call("roster", {})
        except NoControlError as error:
            log.warning("control plane: %s", error)
            return
        sent = found.get("roster")
        if not isinstance(sent, str):
            raise FedveilError(f"{self._kit.control}: sent no roster; ask the server's operator")
        before = self._kit.read_roster().version
        roster = self._kit.keep_roster(sent.encode(errors="replace"))
        if roster.version != before:
            names = ", ".join(site.name for site in roster.sites)
            log.warning("roster %d is in force: %s", roster.version, names)
        refresh_identities(self._site, roster)

    def _say(self, state: State, **changes: Any) -> None:  # noqa: ANN401
        """For the site's owner; what cannot be written down must not stop the work."""
        self._status = self._status.now(state, **changes)
        with suppress(OSError):
            write_status(self._kit.state, self._status)

    def _forget_other_runs(self, fleet: Fleet, run_id: int) -> None:
        """Erases keys of earlier runs: of one that failed nobody else says that it is over.

        Also of the same run before it was resumed, which is another one to Flower; but not where
        this process only follows another one in the middle of it.
        """
        if self._noted_session().get("run") != run_id:
            self._site.secure.forget()
            self._keep(_SESSION, {"node": fleet.node_id, "run": run_id})

    def _noted_session(self) -> dict[str, Any]:
        """What was noted of the last session; nothing if the note is damaged."""
        path = self._kit.state / _SESSION
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict) and all(type(value) is int for value in found.values()):
                return found
        return {}

    def _last_session(self) -> int:
        return int(self._noted_session().get("node", 0))

    def _keep(self, name: str, content: dict[str, Any] | None) -> None:
        """Writes a small file of the site's state, or takes it away."""
        path = self._kit.state / name
        if content is None:
            path.unlink(missing_ok=True)
        else:
            replace_file(path, json.dumps(content).encode(), 0o600, sync=False)


def _round_of(message: Message) -> int:
    group = message.metadata.group_id
    return int(group) if group.isdecimal() else 0


def told(kit: Kit, error: Exception) -> str:
    """What a failed connection means, for the site's own log."""
    if isinstance(error, RefusedError):
        return (
            f"{kit.fleet}: refuses this site ({error}): its key is not on the server's roster, "
            "another process is connected with it, or this machine's clock is wrong"
        )
    if isinstance(error, UnreachableError):
        return f"{kit.fleet}: cannot be reached ({error})"
    return str(error) if isinstance(error, (FedveilError, OSError)) else scrubbed(error)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
