"""`calotype encode --cluster`: the files of a command on the workers of a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import click

from calotype import api
from calotype.cli.batch import STREAM, Batch, Product, Progress, Task, read_bytes
from calotype.cli.console import Settings
from calotype.cli.options import BatchOptions
from calotype.cluster import manifest
from calotype.cluster.manifest import Manifest
from calotype.cluster.pictures import PictureEncoder
from calotype.cluster.throughput import Throughput
from calotype.cluster.workers import Workers
from calotype.job import EncodedPicture, EncodeJob


def encode_on_cluster(
    address: str,
    job: EncodeJob,
    tasks: Sequence[Task],
    batch: BatchOptions,
    settings: Settings,
    *,
    schema: str,
    limit: int | None,
    product: Callable[[EncodedPicture], Product],
) -> int:
    """Do what is left of `tasks` with at most `limit` workers; returns the exit code.

    This process reads and writes all files, so the machines need not share any folder.
    """
    if any(STREAM in (task.source, task.target) for task in tasks):
        raise click.UsageError("--cluster takes files and writes files; standard input and output are not possible.")
    weights = api.model(job.model).sha256
    record = Manifest(_folder(tasks, batch.output) / manifest.NAME, {**asdict(job), "weights": weights})
    left = [task for task in tasks if batch.force or not record.finished(task.source, task.target)]
    if len(left) < len(tasks):
        _say(settings, f"{len(tasks) - len(left)} of {len(tasks)} files were done before ({record.path})")

    def run(jobs: int, work: Callable[[Task, Progress], Product]) -> int:
        return Batch(left, replace(batch, jobs=jobs), settings, schema=schema).run(work)

    if not left or batch.dry_run:
        return run(1, _nothing)
    with Workers(address, partial(PictureEncoder, job, weights), device=settings.device, limit=limit) as workers:
        throughput = Throughput("pictures", "Mpx", 2)

        def work(task: Task, progress: Progress) -> Product:
            try:
                done = workers.call(read_bytes(task.source), lambda: progress(0.0))
            except Exception as error:
                record.failed(task.source, task.target, error)
                raise
            made = done.result
            record.succeeded(task.source, task.target, made.encoded.data, done.worker)
            throughput.add(done.worker, made.width * made.height / 1e6, done.seconds)
            finished = product(made)
            return replace(finished, record={**finished.record, "worker": done.worker})

        # Twice as many files are at hand as are being worked on, so that no worker waits for a disk.
        code = run(2 * len(workers), work)
        for line in throughput.lines():
            _say(settings, line)
    return code


def _folder(tasks: Sequence[Task], output: str | None) -> Path:
    """Where the manifest is: the folder named by -o, else the one that all outputs have in common."""
    common = Path(os.path.commonpath([task.target.parent.resolve() for task in tasks]))
    named = None if output is None else Path(output).resolve()
    return named if named is not None and named in (common, *common.parents) else common


def _say(settings: Settings, line: str) -> None:
    if not settings.quiet:
        click.echo(line, err=True)


def _nothing(task: Task, progress: Progress) -> Product:
    raise AssertionError(f"{task.source} should not have been worked on")
