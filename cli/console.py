"""What the user sees: messages and progress on standard error, results on standard output, errors as exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import click

from calotype.errors import CalotypeError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SOME_FAILED = 9
INTERRUPTED = 130

_interrupted = threading.Event()


@dataclass
class Settings:
    """The global options, given before or after the command's name."""

    verbose: int = 0
    quiet: bool = False
    device: str = "auto"


# Interruption -----------------------------------------------------------------------------------------------------


def check_interrupt() -> None:
    """Raise KeyboardInterrupt if the user asked to stop: worker threads get no signals, so they ask."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _on_signal(_number: int, _frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


@contextmanager
def _signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM both unwind the stack, so that temporary files go; the old handlers come back afterwards."""
    _interrupted.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A shell starts background jobs with SIGINT ignored; that choice is kept.
    wanted = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    old = {number: signal.signal(number, _on_signal) for number in wanted}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# Errors -----------------------------------------------------------------------------------------------------------


def exit_code(error: BaseException) -> int:
    """The exit code that stands for `error`."""
    return error.exit_code if isinstance(error, CalotypeError | click.ClickException) else 1


def describe(error: BaseException) -> str:
    """One line about `error`: what to do for errors we know, a request for a report for those we do not."""
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, CalotypeError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return f"{where}{error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory; try a smaller --tile, fewer --jobs or a --region"
    lines = str(error).splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"unexpected error ({what}); please report it with the output of the same command under -vv"


def show_error(error: BaseException, settings: Settings, subject: str | None = None) -> None:
    """Print `error` on standard error; the traceback only with -vv."""
    if settings.verbose >= 2:
        click.echo("".join(traceback.format_exception(error)).rstrip(), err=True)
    message = describe(error)
    # Errors of the engine and the system often name the file already.
    if subject and not message.startswith(subject):
        message = f"{subject}: {message}"
    click.echo(f"calotype: {message}", err=True)


def guarded(run: Callable[[], object], settings: Settings) -> int:
    """Call `run` and turn whatever comes out of it into an exit code; click itself ends quietly on a broken pipe."""
    try:
        with _signals():
            result = run()
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, click.Abort):
        click.echo("calotype: interrupted", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:
        # A library may turn an interrupt into an error of its own, an ImportError say.
        if _interrupted.is_set():
            click.echo("calotype: interrupted", err=True)
            return INTERRUPTED
        show_error(error, settings)
        return exit_code(error)


# Output -----------------------------------------------------------------------------------------------------------


def print_json(schema: str, fields: Mapping[str, Any]) -> None:
    """One JSON document on standard output; `schema` names and numbers its shape."""
    click.echo(json.dumps({"schema": schema, **fields}, indent=2))


def refuse_terminal() -> None:
    """Raise if standard output is a terminal, which binary data would garble."""
    if sys.stdout.isatty():
        raise click.UsageError("Refusing to write binary data to a terminal: redirect standard output or use -o FILE.")


def write_stdout(data: bytes) -> None:
    """Binary data to standard output."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def file_size(count: int) -> str:
    """Bytes for people: 812 B, 41.3 kB, 2.10 MB."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def stage_times(settings: Settings, seconds: Mapping[str, float]) -> str:
    """With -v: the time of each stage, to append to a line."""
    if not settings.verbose:
        return ""
    return "".join(f"; {stage} {value:.3f} s" for stage, value in seconds.items())


class Reporter:
    """Lines and one progress bar on standard error. The bar counts files and the done parts of those under way."""

    def __init__(self, settings: Settings, *, files: int, bar: bool) -> None:
        self._settings = settings
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._done: dict[int, float] = {}
        self._lock = threading.Lock()
        if bar and not settings.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True), transient=True)
            self._bar = self._progress.add_task("", total=files)

    def __enter__(self) -> Reporter:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def line(self, text: str) -> None:
        """A line of result for people; not with --quiet."""
        if self._settings.quiet:
            return
        if self._progress is not None:
            # rich moves the bar out of the way; file names are not markup.
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(text, err=True)

    def error(self, error: BaseException, subject: str) -> None:
        """A failed file; also with --quiet."""
        if self._progress is not None:
            self._progress.stop()
        show_error(error, self._settings, subject)
        if self._progress is not None:
            self._progress.start()

    def advance(self, number: int, fraction: float) -> None:
        """File `number` is done up to `fraction`. Also the place where a long computation learns of an interrupt."""
        check_interrupt()
        if self._progress is None or self._bar is None:
            return
        with self._lock:
            self._done[number] = min(1.0, max(fraction, self._done.get(number, 0.0)))
            self._progress.update(self._bar, completed=sum(self._done.values()))
