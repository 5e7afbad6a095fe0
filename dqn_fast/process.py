"""Signals, standard streams and missing packages of a command.

`@command()` makes a `main` end with an exit status and at most one line, whatever happens to its
signals and streams. `with stop_requests()` turns signals into a request to stop, which `train`
answers between chunks, from Python too. This module imports the standard library alone, because
the package starts a command before it imports anything else.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any, NoReturn, ParamSpec

P = ParamSpec("P")

STOP_SIGNALS: tuple[int, ...] = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
"""Signals that ask a run to stop, from a terminal, a shell or a job scheduler."""


# -------------------------------------------------------------------------------------- signals


class Interruption:
    """Signals that asked this process to stop; a context manager that installs the handlers.

    A handler is installed where the present one is the default: a signal that is ignored (nohup, a
    job in the background) stays ignored. At the end the earlier handlers are back. Only the main
    thread can enter it.

    The first signal prints one line. Before `defer` it also raises KeyboardInterrupt in the main
    thread, because there is nothing to save; after it, a caller asks between two steps. Later
    signals have no effect, because schedulers and shells send them again; only a second SIGINT has.

    Attributes:
        signal: number of the first signal, or None.
        outer: the Interruption that was active before, or that of the main thread.
    """

    def __init__(self, at_once: bool = False) -> None:
        """Install nothing yet.

        Args:
            at_once: whether a second SIGINT ends the process, even while the main thread is in a
                long call of C code. Otherwise it raises KeyboardInterrupt in the main thread.
        """
        self.signal: int | None = None
        self.outer: Interruption | None = None
        self._at_once, self._raises = at_once, False
        self._handlers: dict[int, Any] = {}
        self._watch: _Watch | None = None
        self._handled: list[float] = []
        self._watched: list[float] = []
        self._ending = threading.Lock()

    def __enter__(self) -> Interruption:
        global _active
        self.outer, _active = _active, self
        if self._at_once:
            self._watch = _Watch(self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        self._raises = False
        self._restore(ends=_is_command and self.outer is None)
        if self._watch is not None:
            self._watch.close()
        _active = self.outer

    def install(self, *numbers: int) -> None:
        """Handle these signals too, until the end of this context; in the main thread only."""
        for number in numbers:
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                self._handlers[number] = handler
                signal.signal(number, self._handle)

    def _restore(self, ends: bool = False) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._handle:  # else a caller has installed another
                # While the process ends, a signal must not change its exit status.
                signal.signal(number, signal.SIG_IGN if ends else handler)

    def __call__(self) -> bool:
        """Whether a signal has asked to stop."""
        return self.signal is not None or (self.outer is not None and self.outer())

    @property
    def status(self) -> int:
        """Exit status for this signal, as a shell gives it; of SIGINT if there was none."""
        return 128 + (self.signal or signal.SIGINT)

    def raise_first(self) -> None:
        """From now on, until `defer`, the first signal raises KeyboardInterrupt.

        Raises:
            KeyboardInterrupt: a signal came earlier.
        """
        self._raises = True
        if self.signal is not None:
            raise KeyboardInterrupt

    def defer(self) -> None:
        """From now on the first signal raises nothing: the caller asks, saves and ends.

        Raises:
            KeyboardInterrupt: a signal came while it was to raise; code that ignores exceptions,
                such as a destructor, has swallowed its own.
        """
        raises, self._raises = self._raises, False
        if raises and self.signal is not None:
            raise KeyboardInterrupt

    def raise_again(self) -> None:
        """Give the signal the effect that it has without this object.

        Raises:
            KeyboardInterrupt: it was SIGINT. After others the process ends, unless the caller has
                a handler.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # None, closed, or on a full disk
                    stream.flush()
            signal.raise_signal(self.signal)

    def _handle(self, number: int, _: FrameType | None) -> None:
        """The handler; Python calls it in the main thread."""
        first, self.signal = self.signal is None, self.signal or number
        again = number == signal.SIGINT and _again(self._handled)
        if again and self._at_once:
            self._end()
        if first:
            effect = "ending" if self._raises else "saving, then ending"
            _say(f"{signal.Signals(number).name}: {effect}; a second SIGINT ends at once")
        if again or (first and self._raises):
            raise KeyboardInterrupt

    def _notice(self, number: int) -> None:
        """Called by the watch, in its thread."""
        if number == signal.SIGINT and _again(self._watched):
            self._end()

    def _end(self) -> NoReturn:
        """End without any clean-up: every file is written under another name first."""
        self._ending.acquire()  # handler and watch both come here
        with contextlib.suppress(OSError):
            os.write(2, b"SIGINT again: ended at once\n")
        if "multiprocessing" in sys.modules:
            import multiprocessing

            for child in multiprocessing.active_children():  # they would wait, or complain
                child.kill()
        os._exit(128 + signal.SIGINT)

    def _after_fork(self) -> None:
        """In a forked child: signals are its parent's business."""
        if self._watch is not None:
            self._watch.abandon()
        self._restore()


class _Watch:
    """A thread that sees a signal while the main thread is in C code.

    Python runs a handler between two instructions of the main thread, after a product of matrices
    of 20 s or a file system that hangs. But it writes the signal's number into a pipe at once.
    """

    def __init__(self, notice: Callable[[int], None]) -> None:
        """Start the thread.

        Args:
            notice: called in the thread with the number of each signal that has a handler.
        """
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(
            target=self._run, args=(notice,), name="signal-watch", daemon=True
        )
        self._thread.start()

    def _run(self, notice: Callable[[int], None]) -> None:
        while 0 not in (numbers := os.read(self._read, 64)):
            for number in numbers:
                notice(number)

    def close(self) -> None:
        """End the thread."""
        signal.set_wakeup_fd(self._before)
        os.set_blocking(self._write, True)
        os.write(self._write, b"\0")  # no signal
        self._thread.join()
        self._close_pipe()

    def abandon(self) -> None:
        """In a forked child, which has no such thread and must not write into its parent's pipe."""
        signal.set_wakeup_fd(-1)
        self._close_pipe()

    def _close_pipe(self) -> None:
        os.close(self._read)
        os.close(self._write)


_active: Interruption | None = None
_is_command = False  # whether this process is `python -m dqn_fast.train` or the like


def _forget() -> None:
    global _active, _is_command
    if _active is not None:
        _active._after_fork()
    _active, _is_command = None, False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def stop_requests() -> Iterator[Interruption]:
    """Note the STOP_SIGNALS, for a run that ends, saved, at its next chunk.

    Within a `command`, or within another such context, that one's Interruption is shared, and its
    owner ends the process. Else a signal has its usual effect at the end of this context. Another
    thread than the main one installs nothing and only hears of what the main one has noted.

    Yields:
        Interruption whose first signal raises KeyboardInterrupt; call `defer` on it when there is
        something to save, then ask it between chunks.

    Raises:
        KeyboardInterrupt: there was a SIGINT.
    """
    interruption = Interruption()
    if not _in_main_thread():
        interruption.outer = _active
        yield interruption
        return
    if _active is not None:
        _active.install(*STOP_SIGNALS)
        yield _active
        return
    try:
        with interruption:
            interruption.install(*STOP_SIGNALS)
            interruption.raise_first()
            yield interruption
    except BaseException:
        if interruption.signal != signal.SIGINT:
            interruption.raise_again()
        raise
    interruption.raise_again()


def _again(times: list[float]) -> bool:
    """Count a SIGINT; returns whether it is a second one.

    torchrun sends its workers a copy of the SIGINT that they have from the terminal already: within
    a second of the first one it does not count.
    """
    times.append(time.monotonic())
    return times[-1] - times[0] >= 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else len(times) > 1


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _say(line: str) -> None:
    """Print a line on stderr, from a handler too, which may interrupt a write to it."""
    with contextlib.suppress(Exception):
        bar = "\n" if sys.stderr.isatty() else ""  # a progress bar is in this line
        print(f"{bar}{line}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------ standard streams


class _Output(io.FileIO):
    """Descriptor of a standard stream; data that cannot be written are dropped.

    So no print raises, nor does the interpreter when it flushes the streams at its end.

    Attributes:
        error: of the first write that failed, or None.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:  # a raw stream may write less; 0 or None if it would have to wait
                rest = rest[super().write(rest) or len(rest) :]
        except OSError as error:
            self.error = self.error or error
        return size


def _open_closed() -> None:
    """Open descriptors 0, 1 and 2 where they are closed: the next file would get their number, and
    what is printed would be written into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number


def _guard_streams() -> dict[str, Any]:
    """Let no write to stdout or stderr raise; returns the streams that were replaced.

    A stream that the caller has put in their place is kept.
    """
    _open_closed()
    replaced = {}
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or _output(stream) is not None:
            continue
        replaced[name] = stream
        output: Any = _Output(descriptor)
        # A path may hold what the encoding has no character for.
        options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
        if stream is not None:  # it is, where its descriptor was closed
            with contextlib.suppress(OSError):
                stream.flush()
            options |= {
                name: getattr(stream, name)
                for name in ("encoding", "line_buffering", "write_through")
            }
            if stream.errors == "surrogateescape":
                options["errors"] = stream.errors
        if not options.get("write_through"):
            output = io.BufferedWriter(output)
        setattr(sys, name, io.TextIOWrapper(output, **options))
    return replaced


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Let no write to stdout or stderr raise within this context; what cannot be written is lost.

    Descriptors that are closed are opened on the null device, and stay so.
    """
    replaced = _guard_streams()
    try:
        yield
    finally:
        for name, stream in replaced.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def _output(stream: Any) -> _Output | None:
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, _Output) else None


def _lost_output() -> str | None:
    """Why stdout could not be written; None if it could, or if its reader went away."""
    output = _output(sys.stdout)
    if output is None:
        return None
    sys.stdout.flush()
    if output.error is None or output.error.errno == errno.EPIPE:
        return None
    return output.error.strerror


# ------------------------------------------------------------------------------------- commands


def command(needs_output: bool = True) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorator of a `main` that returns an exit status.

    SIGINT raises KeyboardInterrupt in it, a second one ends the process, and neither shows a
    traceback: the status is 128 plus the signal, that of `stop_requests` too. A package that is
    missing costs one line and status 2. Writes to stdout and stderr never raise.

    Args:
        needs_output: whether the command's result is its output: if that cannot be written, for
            another reason than that its reader went away, one line says so and the status is 1.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            if sys.excepthook is _excepthook:
                sys.excepthook = sys.__excepthook__
            with standard_streams():
                try:
                    status = _run(main, *args, **kwargs)
                except SystemExit as stop:  # --help, or flags that do not parse
                    if stop.code or _lost_output() is None:
                        raise
                    status = 0
                if status == 0 and (why := _lost_output()) is not None:
                    kind = "error" if needs_output else "warning"
                    _say(f"{kind}: stdout: cannot be written ({why})")
                    status = int(needs_output)
                return status

        return run

    return decorate


def _run(main: Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int:
    """Call `main`; returns the exit status."""
    if not _in_main_thread():
        return main(*args, **kwargs)
    with Interruption(at_once=True) as interruption:
        try:
            interruption.install(signal.SIGINT)
            sys.unraisablehook = _unraisable
            interruption.raise_first()
            status = main(*args, **kwargs)
            interruption.defer()
        except KeyboardInterrupt:
            # An exception that has passed through exec of a text, as dataclasses use it, makes the
            # interpreter end by SIGINT whatever the status is, until the next such exec.
            exec("")
            return interruption.status
        except ModuleNotFoundError as error:
            if (line := _missing(error)) is None:
                raise
            _say(line)
            return 2
        return interruption.status if interruption() and status == 0 else status


def _unraisable(error: Any) -> None:
    """sys.unraisablehook of a command: a KeyboardInterrupt that a destructor swallows is raised
    again by `defer`, and its traceback tells nobody anything."""
    if not issubclass(error.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(error)


def start_command() -> None:
    """Begin `python -m dqn_fast.train` and the like, while the package is imported.

    The imports take seconds. Until `main` runs, SIGINT ends the process silently, and a package
    that is missing or broken costs one line and exit status 2. In a program that imports the
    package, this does nothing.
    """
    global _is_command
    # sys.argv still lacks the module's path, which follows Python's own options.
    module = sys.orig_argv[-len(sys.argv)]
    if re.fullmatch(r"(-\w*m)?dqn_fast(\.\w+)*", module) is None:
        return
    _is_command = True
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = _excepthook
    _guard_streams()  # to the end of the process


def require(*packages: str) -> None:
    """Look for packages that are imported later, without importing them.

    Raises:
        ModuleNotFoundError: one is not installed.
    """
    for package in packages:
        if sys.modules.get(package) is None and find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def _excepthook(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """sys.excepthook until `main` runs; the exit status of SystemExit is that of the process."""
    line = _missing(error)
    if line is None:
        sys.__excepthook__(kind, error, traceback)
        return
    _say(line)
    raise SystemExit(2)


def _missing(error: BaseException) -> str | None:
    """Which package cannot be imported, in one line; None if the error has another reason."""
    install = "`pip install -e .` in dqn_fast's folder installs what it needs"
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.split(".")[0]
        return None if missing == "dqn_fast" else f"error: {missing} is not installed; {install}"
    # The file that the last line of this package, an import, has led to.
    folder, frames = str(Path(__file__).parent), error.__traceback__
    name: str | None = None
    while frames is not None:
        frame, frames = frames.tb_frame, frames.tb_next
        if frame.f_code.co_filename.startswith(folder):
            name = None
        elif name is None and not frame.f_code.co_filename.startswith("<frozen"):
            name = str(frame.f_globals.get("__name__")).split(".")[0]
    if name is None and isinstance(error, ImportError) and error.name:
        name = error.name.split(".")[0]
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        name = error.obj.__name__.split(".")[0]  # of which only a part is installed
    if name in (None, "dqn_fast"):
        return None
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return f"error: {name} cannot be imported ({reason}); {install}"
