"""A request to stop: SIGTERM, as before a machine is taken away, or SIGINT, which is Ctrl-C."""

import contextlib
import os
import signal
import socket
import threading
from types import TracebackType
from typing import Any

from mlm_jax import status

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run that was asked to stop has saved and can go on."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"stopped as asked, step {step} is saved; the same command goes on from there")


class Requests:
    """A context manager, for the main thread: the first signal within it is noted, a second one ends the process at once.

    Signals reach it also while the main thread waits for the devices, which Python's own handlers have to wait for: the C library writes each
    into a socket, which a thread reads.
    """

    def __init__(self) -> None:
        self.asked = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Requests":
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are the main thread's
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: of another language
        if self._handlers:
            signal.set_wakeup_fd(self._before)
            self._writer.close()  # the thread reads to the end

    def _listen(self) -> None:
        with self._reader:
            while numbers := self._reader.recv(64):
                for number in numbers:
                    if number not in SIGNALS:
                        continue
                    name = signal.Signals(number).name
                    if self.asked:
                        _say(f"{name} again: ends at once, the checkpoints that are whole stay")
                        os._exit(status.SIGNALLED + number)
                    self.asked = True
                    _say(f"{name}: stops after this step and saves; once more ends at once")


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
