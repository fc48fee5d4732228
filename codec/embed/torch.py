"""Calotype files as a data set of PyTorch: workers read bytes, pictures are decoded on the model's device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from calotype import container
from calotype.api import Codec
from calotype.errors import InputError

Transform = Callable[[Tensor], Tensor]


class Dataset(torch.utils.data.Dataset[Any]):
    """The bytes of files, with a target each if there are some.

    Args:
        files: paths; nothing is opened before an item is asked for.
        targets: labels, one for each file.
    Raises:
        InputError for another number of targets. An item: InputError for a file that cannot be read.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]], targets: Sequence[Any] | None = None) -> None:
        if targets is not None and len(targets) != len(files):
            raise InputError(f"{len(targets)} targets for {len(files)} files: give one for each")
        self.files, self.targets = files, targets

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        """The bytes, or (bytes, target)."""
        path = Path(self.files[index])
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error
        return data if self.targets is None else (data, self.targets[index])


class Loader:
    """A DataLoader over samples of bytes that gives pictures, uint8 [N, 3, H, W] on the codec's device.

    Gray is repeated and alpha dropped. Without a transform the pictures of a batch must have one size.

    Args:
        dataset: its samples are the bytes of a file, or tuples that begin with them (as `Dataset` and webdataset's
            `to_tuple` give); then a batch is a list of the pictures and the rest, collated as usual.
        device: "auto" is CUDA where there is one, else the CPU.
        scale: 1, 2, 4 or 8: decode pictures at 1/scale of their size.
        transform: called with each picture, uint8 [3, H, W] on the device; what it gives is stacked.
        options: of `torch.utils.data.DataLoader`: batch_size, shuffle, num_workers, sampler and so on.
    Raises:
        InputError for a device that is not here, ModelNotFoundError. Iterating: InputError for pictures of several
        sizes, FormatError and its kinds for a damaged file, LimitError.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset[Any],
        *,
        device: str = "auto",
        scale: int = 1,
        transform: Transform | None = None,
        **options: Any,
    ) -> None:
        self.codec = Codec.load(device=device)
        self.scale, self.transform = scale, transform
        self.samples: DataLoader[Any] = DataLoader(dataset, **options)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.samples:
            if isinstance(batch[0], bytes):
                yield self._pictures(batch)
            else:
                yield [self._pictures(batch[0]), *batch[1:]]

    def _pictures(self, files: Sequence[bytes]) -> Tensor:
        groups: dict[object, list[int]] = {}
        for number, data in enumerate(files):
            header = container.read_header(data)
            groups.setdefault((header.width, header.height, header.channels, header.alpha), []).append(number)
        pictures: dict[int, Tensor] = {}
        for numbers in groups.values():
            x = self.codec.decode_batch([files[n] for n in numbers], scale=self.scale)
            x = x[:, :1].expand(-1, 3, -1, -1) if x.shape[1] < 3 else x[:, :3]
            pictures.update(zip(numbers, x, strict=True))
        ordered = [pictures[n] if self.transform is None else self.transform(pictures[n]) for n in range(len(files))]
        if len({picture.shape for picture in ordered}) > 1:
            sizes = ", ".join(sorted({"x".join(map(str, picture.shape)) for picture in ordered}))
            raise InputError(f"the pictures of a batch have several sizes ({sizes}): crop or resize in the transform")
        return torch.stack(ordered)
