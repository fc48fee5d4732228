"""Inputs to outputs: which files, under which names, in what order, and what became of each."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click

from calotype.cli.console import (
    SOME_FAILED,
    Reporter,
    Settings,
    check_interrupt,
    describe,
    exit_code,
    print_json,
    refuse_terminal,
    write_stdout,
)
from calotype.cli.options import BatchOptions, processors
from calotype.errors import InputError, OutputExistsError

STREAM = Path("-")
"""Stands for standard input or output."""

Progress = Callable[[float], None]
Status = Literal["ok", "partial", "skipped", "planned", "failed"]


@dataclass(frozen=True)
class Task:
    """One input and the output it becomes."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Product:
    """What a task made: the bytes to publish, the fields of its JSON record and a line for people."""

    data: bytes
    record: dict[str, Any]
    line: str
    partial: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a task."""

    task: Task
    status: Status
    record: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None

    def as_record(self) -> dict[str, Any]:
        """The JSON record; the same keys for every file of a status."""
        record: dict[str, Any] = {
            "input": click.format_filename(self.task.source),
            "output": click.format_filename(self.task.target),
            "status": self.status,
            **self.record,
        }
        if self.error is not None:
            record["error"] = error_record(self.error)
        return record


def error_record(error: BaseException) -> dict[str, Any]:
    """An error in JSON."""
    return {"type": type(error).__name__, "message": describe(error), "exit_code": exit_code(error)}


# Planning ---------------------------------------------------------------------------------------------------------


def plan(inputs: Sequence[Path], options: BatchOptions, *, suffix: str, input_suffixes: Collection[str]) -> list[Task]:
    """Pair every input with its output before anything runs.

    Outputs get `suffix`; in folders only files with one of `input_suffixes` are taken. Raises click.UsageError where
    two inputs meet in one output or an output would replace an input.
    """
    output = options.output
    if STREAM in inputs and len(inputs) > 1:
        raise click.UsageError("Standard input (-) must be the only input.")
    several = len(inputs) > 1 or any(path.is_dir() for path in inputs)
    if output == "-" or (output is None and STREAM in inputs):
        if several:
            raise click.UsageError("Only one input can go to standard output; use -o FOLDER.")
        if not options.dry_run:
            refuse_terminal()
        return [Task(inputs[0], STREAM)]
    if output is not None and not (several or _names_folder(output)):
        tasks = [Task(inputs[0], Path(output))]
    elif STREAM in inputs:
        raise click.UsageError("Standard input has no name: -o must name a file, not a folder.")
    else:
        folder = None if output is None else Path(output)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise click.UsageError(f"{output} is a file, but several outputs need a folder.")
        tasks = [
            Task(source, (source if folder is None else folder / relative).with_suffix(suffix))
            for source, relative in _expand(inputs, input_suffixes, options.recursive)
        ]
    # The same file named twice is one task.
    tasks = list(dict.fromkeys(tasks))
    _refuse_clashes(tasks)
    return tasks


def _names_folder(output: str) -> bool:
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


def _expand(inputs: Sequence[Path], suffixes: Collection[str], recursive: bool) -> Iterator[tuple[Path, Path]]:
    """Every input file with its path below the named folder (for a file: its name)."""
    found = False
    for path in inputs:
        if not path.is_dir():
            found = True
            yield path, Path(path.name)
            continue
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted(name for name in subfolders if recursive and not name.startswith("."))
            for name in sorted(names):
                # Hidden files are leftovers and side files, not pictures that somebody chose.
                if Path(name).suffix.lower() in suffixes and not name.startswith("."):
                    found = True
                    source = Path(folder, name)
                    yield source, source.relative_to(path)
    if not found:
        advice = "" if recursive else "; use --recursive for its subfolders"
        raise InputError(f"{inputs[0]}: no file ends in {', '.join(sorted(suffixes))}{advice}")


def _refuse_clashes(tasks: Sequence[Task]) -> None:
    sources = {_identity(task.source): task.source for task in tasks if task.source != STREAM}
    targets: dict[object, Task] = {}
    for task in tasks:
        identity = _identity(task.target)
        if identity in sources:
            raise click.UsageError(f"{task.target} is an input too; choose another output.")
        if identity in targets:
            other = targets[identity].source
            raise click.UsageError(
                f"{other} and {task.source} would both become {task.target}; "
                "give their common folder as the input, or convert them apart."
            )
        targets[identity] = task


def _identity(path: Path) -> object:
    """The same for two names of one file, links included."""
    try:
        status = path.stat()
    except OSError:
        return path.resolve()
    return status.st_dev, status.st_ino


# Reading ----------------------------------------------------------------------------------------------------------


def read_bytes(source: Path) -> bytes:
    """The bytes of a file or of standard input. Raises InputError."""
    if source == STREAM:
        return sys.stdin.buffer.read()
    try:
        return source.read_bytes()
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}") from error


# Running ----------------------------------------------------------------------------------------------------------


class Batch:
    """Runs tasks, one or several at a time; a task that fails leaves the others alone."""

    def __init__(self, tasks: Sequence[Task], options: BatchOptions, settings: Settings, *, schema: str) -> None:
        self._tasks = tasks
        self._options = options
        self._settings = settings
        self._schema = schema
        self._outcomes: dict[int, Outcome] = {}
        self._publishing = threading.Lock()
        bar = not (options.no_progress or options.dry_run or options.as_json)
        self._reporter = Reporter(settings, files=len(tasks), bar=bar)

    def run(self, work: Callable[[Task, Progress], Product], prepare: Callable[[], object] | None = None) -> int:
        """Do all tasks with `work` and return the exit code. `prepare` is called once if there is anything to do."""
        with self._reporter:
            open_tasks = self._preflight()
            if open_tasks and not self._stopped():
                if prepare is not None:
                    prepare()
                self._run_all(open_tasks, work)
        return self._conclude()

    def _preflight(self) -> list[int]:
        """Settle what needs no computation; returns the numbers of the tasks that are left."""
        left = []
        for number, task in enumerate(self._tasks):
            exists = task.target != STREAM and task.target.exists()
            if task.source != STREAM and not task.source.exists():
                self._settle(number, Outcome(task, "failed", error=InputError(f"{task.source}: no such file")))
            elif exists and not task.target.is_file():
                # Renaming over /dev/null, say, would replace the device.
                error = OutputExistsError(f"{task.target} is not a regular file; choose another output, - for a pipe")
                self._settle(number, Outcome(task, "failed", error=error))
            elif exists and self._options.skip_existing:
                self._settle(number, Outcome(task, "skipped"), f"{_arrow(task)}: exists, skipped")
            elif exists and not self._options.force:
                error = OutputExistsError(f"{task.target} exists; use --force to overwrite it or --skip-existing")
                self._settle(number, Outcome(task, "failed", error=error))
            elif self._options.dry_run:
                # The plan is the result of a dry run, so it goes to standard output.
                if not self._options.as_json:
                    click.echo(_arrow(task))
                self._settle(number, Outcome(task, "planned"))
            else:
                left.append(number)
            if self._stopped():
                break
        return left

    def _run_all(self, numbers: Sequence[int], work: Callable[[Task, Progress], Product]) -> None:
        jobs = min(self._options.jobs, len(numbers))
        if jobs == 1:
            for number in numbers:
                self._run_one(number, work)
                if self._stopped():
                    return
            return
        # Torch would use every processor for every file.
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, processors() // jobs))
        pool = ThreadPoolExecutor(jobs)
        try:
            futures: list[Future[None]] = [pool.submit(self._run_one, number, work) for number in numbers]
            for future in as_completed(futures):
                future.result()
                if self._stopped():
                    return
        finally:
            # Files under way end (or, when interrupted, stop at their next report of progress); the rest never start.
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def _run_one(self, number: int, work: Callable[[Task, Progress], Product]) -> None:
        task = self._tasks[number]
        self._reporter.advance(number, 0.0)
        try:
            product = work(task, lambda fraction: self._reporter.advance(number, fraction))
            self._publish(task, product.data)
        except BrokenPipeError:
            raise
        except Exception as error:
            # A library may have turned an interrupt into an error of its own.
            check_interrupt()
            self._settle(number, Outcome(task, "failed", error=error))
        else:
            outcome = Outcome(task, "partial" if product.partial else "ok", product.record)
            self._settle(number, outcome, f"{_arrow(task)}: {product.line}")

    def _publish(self, task: Task, data: bytes) -> None:
        from calotype.media import write_file

        with self._publishing:
            check_interrupt()
            if task.target == STREAM:
                write_stdout(data)
                return
            write_file(task.target, data, overwrite=self._options.force)
            if self._options.preserve_times and task.source != STREAM:
                status = task.source.stat()
                os.utime(task.target, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _settle(self, number: int, outcome: Outcome, line: str | None = None) -> None:
        self._outcomes[number] = outcome
        if outcome.error is not None:
            self._reporter.error(outcome.error, click.format_filename(outcome.task.source))
        elif line is not None:
            self._reporter.line(line)
        self._reporter.advance(number, 1.0)

    def _stopped(self) -> bool:
        return self._options.fail_fast and any(o.status == "failed" for o in list(self._outcomes.values()))

    def _conclude(self) -> int:
        """The summary, the JSON document and the exit code."""
        outcomes = [self._outcomes[number] for number in sorted(self._outcomes)]
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        counts = {status: sum(o.status == status for o in outcomes) for status in ("skipped", "failed")}
        not_started = len(self._tasks) - len(outcomes)
        if self._options.as_json:
            records = [outcome.as_record() for outcome in outcomes]
            print_json(self._schema, {"results": records, **counts, "not_started": not_started})
        elif len(self._tasks) > 1 and not self._options.dry_run:
            done = sum(outcome.status in ("ok", "partial") for outcome in outcomes)
            parts = [f"{done} done", *(f"{count} {status}" for status, count in counts.items() if count)]
            if not_started:
                parts.append(f"{not_started} not started")
            summary = f"{len(self._tasks)} files: {', '.join(parts)}"
            if errors:
                # Also with --quiet: it belongs to the errors.
                click.echo(f"calotype: {summary}", err=True)
            else:
                self._reporter.line(summary)
        if not errors:
            return 0
        return exit_code(errors[0]) if len(self._tasks) == 1 else SOME_FAILED


def _arrow(task: Task) -> str:
    return f"{click.format_filename(task.source)} -> {click.format_filename(task.target)}"
