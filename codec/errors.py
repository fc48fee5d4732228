"""Every error that Calotype raises on purpose; each knows the exit code of the command line."""

from __future__ import annotations

from typing import ClassVar


class CalotypeError(Exception):
    """Base of all errors; its text is one sentence that says what is wrong and what to do."""

    exit_code: ClassVar[int] = 1


class InputError(CalotypeError):
    """The input cannot be read, or is of a kind that is not supported."""

    exit_code = 3


class LimitError(CalotypeError):
    """The input is larger than a limit allows."""

    exit_code = 3


class FormatError(CalotypeError):
    """The stream is not a Calotype file, or is damaged."""

    exit_code = 4


class ChecksumError(FormatError):
    """A chunk's CRC does not match its contents."""


class TruncatedError(FormatError):
    """The stream ends too early."""


class ModelNotFoundError(CalotypeError):
    """The weights that a stream needs are not here, or differ from the registered ones."""

    exit_code = 5


class OutputExistsError(CalotypeError):
    """The output file is there already."""

    exit_code = 6


class TargetError(CalotypeError):
    """No quality reaches the target."""

    exit_code = 7


class VerifyError(CalotypeError):
    """A check of a written file failed."""

    exit_code = 8


class DriftError(VerifyError):
    """The decoded symbols differ from the encoded ones although the bytes are intact: a broken device or library."""
