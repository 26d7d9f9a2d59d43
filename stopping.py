"""What SIGINT and SIGTERM do to a run: nothing is lost."""
import contextlib
import os
import signal


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; not an Exception, so that nothing takes it for a failure of its own."""


class Stop:
    """SIGINT and SIGTERM: a training step is finished first (`requested`), but `with stop.at_once():` they raise Stopped."""

    def __init__(self):
        self.requested, self.immediate, self.process = False, False, os.getpid()
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(self, number, frame):
        if os.getpid() == self.process:                        # not in a copy of it that loads data
            self.requested = True
            if self.immediate:
                raise Stopped

    @contextlib.contextmanager
    def at_once(self):
        self.immediate = True
        try:
            if self.requested:
                raise Stopped
            yield
        finally:
            self.immediate = False

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave_signals_to_the_run(worker: int):
    """A shell's Ctrl-C and a scheduler's SIGTERM reach the data-loading processes too, which the last step still needs; a
    second SIGTERM is the run's own and ends one that is stuck."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
