"""The record of a run beside its outputs: one JSON line for each file, so that a run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calotype.errors import InputError

NAME = ".calotype-manifest.jsonl"


class Manifest:
    """Appends lines to a file and knows what those of earlier runs say; threads may share one.

    A line has source; output, relative to the manifest; options; and status: "ok" with source_size, source_mtime_ns,
    bytes, sha256 and worker, or "failed" with error.

    Args:
        path: its folder is made when the first line is written.
        options: what the outputs depend on, as JSON values.
    Raises:
        InputError if it cannot be read.
    """

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        self.path = path
        self._options = json.loads(json.dumps(options))  # as it will be read back
        self._lock = threading.Lock()
        try:
            text = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error
        self._ragged = bool(text) and not text.endswith(b"\n")
        self._last: dict[str, dict[str, Any]] = {}
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._last[entry["output"]] = entry
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a run that was killed, or somebody's comment

    def finished(self, source: Path, output: Path) -> bool:
        """Whether `output` is what an earlier run with these options made of `source` as it is now."""
        entry = self._last.get(self._name(output), {})
        try:
            return (
                entry.get("status") == "ok"
                and entry["source"] == str(source.resolve())
                and entry["options"] == self._options
                and all(entry[key] == value for key, value in _state(source).items())
                and output.stat().st_size == entry["bytes"]
                and hashlib.sha256(output.read_bytes()).hexdigest() == entry["sha256"]
            )
        except (OSError, KeyError):
            return False

    def succeeded(self, source: Path, output: Path, data: bytes, worker: str) -> None:
        """Note that `data` is about to be written to `output`."""
        written = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "worker": worker}
        self._append(source, output, {"status": "ok", **_state(source), **written})

    def failed(self, source: Path, output: Path, error: BaseException) -> None:
        """Note that `source` cannot be encoded."""
        self._append(source, output, {"status": "failed", "error": f"{type(error).__name__}: {error}"})

    def _name(self, output: Path) -> str:
        return os.path.relpath(output, self.path.parent)

    def _append(self, source: Path, output: Path, fields: Mapping[str, Any]) -> None:
        entry = {"source": str(source.resolve()), "output": self._name(output), "options": self._options, **fields}
        line = json.dumps(entry) + "\n"
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n" + line if self._ragged else line)
            except OSError as error:
                raise InputError(f"{self.path} cannot be written: {error.strerror or error}") from error
            self._ragged = False


def _state(source: Path) -> dict[str, int]:
    """What tells whether a file is still the same. Raises OSError."""
    status = source.stat()
    return {"source_size": status.st_size, "source_mtime_ns": status.st_mtime_ns}
