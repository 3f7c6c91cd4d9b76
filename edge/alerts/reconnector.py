"""The one task that keeps a connection to the broker up. Knows no alerts: what is said is for whoever serves it."""

from __future__ import annotations

import logging
import random
import threading
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from edge.alerts.mqtt import Connected, Link, LinkKind, LinkState, Lost, Wake
from edge.alerts.settings import Protocol
from edge.errors import BrokerError, OutboxError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.alerts.mqtt import Inbox, Will
    from edge.alerts.settings import BrokerSettings

LOG = logging.getLogger("lineward.mqtt")
# mosquitto 2.0 does not say that another client took the session over; what it looks like is all there is to go by.
_SHORT_LIVES = 3
_SHORT_LIVED = " soon after each connect; does another client use this client_id? Give each box its own name"


class Reconnector:
    """The one task that keeps a connection up: connects, lets ``serve`` use it, waits, connects again.

    Waits double from ``backoff_min_s`` to ``backoff_max_s`` with a random part, and start over once a connection has
    lasted for the longest wait. One log line per change of state.

    Args:
        settings: the broker.
        client_id: unique at the broker.
        will: what the broker says when we are gone.
        serve: called in the task's thread with each open link, its inbox and what the broker granted. Returns why it
            ended: :class:`Lost`, or None when :attr:`stopping` made it leave. OutboxError ends the connection.
        acknowledges: ``serve`` acknowledges what it takes from the inbox, see :class:`Link`.
    """

    def __init__(
        self,
        *,
        settings: BrokerSettings,
        client_id: str,
        will: Will | None,
        serve: Callable[[Link, Inbox, Connected], Lost | None],
        acknowledges: bool = False,
    ) -> None:
        self._acknowledges = acknowledges
        self.stopping = threading.Event()
        self.connections = 0
        self.defects = 0
        self._settings = settings
        self._client_id = client_id
        self._will = will
        self._serve = serve
        self._state = LinkState(LinkKind.CONNECTING)
        self._changed = threading.Condition()
        self._inbox: Inbox = SimpleQueue()
        self._protocol = Protocol.V5 if settings.protocol is Protocol.AUTO else settings.protocol
        self._thread = threading.Thread(target=self._run, name=f"mqtt {client_id}", daemon=True)

    @property
    def state(self) -> LinkState:
        """Where the connection stands."""
        return self._state

    @property
    def alive(self) -> bool:
        """Whether its thread runs; it ends by :meth:`stop` alone, or by a defect."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin, in a thread of its own."""
        self._thread.start()

    def wake(self) -> None:
        """Give ``serve`` a :class:`Wake`."""
        self._inbox.put(Wake())

    def stop(self, timeout: float) -> None:
        """Ask ``serve`` to leave and wait for it, no longer than ``timeout``: a connect that hangs is left behind."""
        self.stopping.set()
        self.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self.set_state(LinkState(LinkKind.STOPPED))

    def wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until ``condition`` holds, looked at whenever the state changes or :meth:`notify` is called."""
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def notify(self) -> None:
        """Let those who wait look again."""
        with self._changed:
            self._changed.notify_all()

    def set_state(self, state: LinkState) -> None:
        """Change the state; a change is logged once."""
        with self._changed:
            if state == self._state:
                return
            before, self._state = self._state, state
            self._changed.notify_all()
        # Connected, and refused all the same, is no calm state: nothing gets out.
        well = state.kind is LinkKind.CONNECTED and not state.reason
        calm = well or LinkKind.STOPPED in {state.kind, before.kind}
        LOG.log(logging.INFO if calm else logging.WARNING, "broker %s: %s", self._settings.address, state)

    def _run(self) -> None:
        delay = self._settings.backoff_min_s
        short_lives, older = 0, False
        while not self.stopping.is_set():
            began, before = time.monotonic(), self.connections
            lost = self._connect_and_serve()
            if lost is None or self.stopping.is_set():
                break
            if self._settings.protocol is Protocol.AUTO and not older:
                if lost.other_protocol and self._protocol is Protocol.V5:
                    # Said by the broker it stays so; a broker that hung up may only have been starting or ending.
                    self._protocol, older = Protocol.V311, lost.refused
                    continue
                self._protocol = Protocol.V5
            lasted = time.monotonic() - began
            if lasted > self._settings.backoff_max_s:
                delay = self._settings.backoff_min_s
            if lasted > 2 * self._settings.backoff_max_s:
                short_lives = 0
            short_lives += self.connections - before
            refused, restless = lost.refused or lost.other_protocol, short_lives >= _SHORT_LIVES
            reason = lost.reason + (_SHORT_LIVED if restless and not refused else "")
            if refused or restless:
                delay = self._settings.backoff_max_s
            self.set_state(LinkState(LinkKind.REFUSED if refused else LinkKind.CONNECTING, reason))
            # Many boxes lose one broker at the same moment; they shall not come back at the same moment.
            self.stopping.wait(delay * random.uniform(0.75, 1.0))  # noqa: S311 (no secret)
            delay = min(2 * delay, self._settings.backoff_max_s)

    def _connect_and_serve(self) -> Lost | None:
        inbox: Inbox = SimpleQueue()
        self._inbox = inbox
        link = Link(
            settings=self._settings,
            client_id=self._client_id,
            protocol=self._protocol,
            will=self._will,
            inbox=inbox,
            acknowledges=self._acknowledges,
        )
        goodbye = False
        try:
            link.open()
            answer = self._await_answer(inbox)
            if not isinstance(answer, Connected):
                return answer
            self.connections += 1
            self.set_state(LinkState(LinkKind.CONNECTED))
            lost = self._serve(link, inbox, answer)
            goodbye = lost is None
        except (BrokerError, SettingsError) as error:
            return Lost(str(error), refused=True)
        except OutboxError as error:
            return Lost(str(error))
        except (OSError, ValueError) as error:
            # ValueError: paho and the ssl module answer so to host names that cannot be encoded.
            answered = self._settings.tls and not isinstance(error, ConnectionRefusedError)
            question = "does this port speak TLS" if answered else "is the broker running at this address"
            return Lost(f"{getattr(error, 'strerror', None) or error}; {question}?")
        except Exception as error:
            # A defect of whoever serves must not leave a box mute: it is counted, and the next connection begins anew.
            self.defects += 1
            LOG.exception("a defect ended the connection")
            return Lost(f"a defect ended the connection ({type(error).__name__}); the log has it, please report it")
        else:
            return lost
        finally:
            link.close(goodbye=goodbye)

    def _await_answer(self, inbox: Inbox) -> Connected | Lost | None:
        deadline = time.monotonic() + self._settings.connect_timeout_s
        while not self.stopping.is_set():
            try:
                event = inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                return Lost(
                    "no answer to CONNECT; is this an MQTT broker?", other_protocol=self._protocol is Protocol.V5
                )
            if isinstance(event, (Connected, Lost)):
                return event
        return None
