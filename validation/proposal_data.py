"""CIFAR-10 and WikiText-2 as they are distributed, read from a folder. Nothing is downloaded.

CIFAR-10: the binary version (`data_batch_1.bin` ... `test_batch.bin`: a byte of class, 3072 of pixels) or the Python version
(`data_batch_1` ... `test_batch`, pickled; only numpy arrays are let out of the pickle). WikiText-2: `wiki.train.tokens` and
`wiki.valid.tokens`, words separated by blanks, a line's end counting as `<eos>`; words of the training file are the vocabulary.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from simtrain.core.errors import InputError

IMAGE_BYTES = 3 * 32 * 32
_MEAN, _DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's channels, as is common (recalled, not looked up)
_UNKNOWN = "<unk>"
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True, slots=True)
class Images:
    """Images in channels first, scaled, and their classes."""

    train: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
    test: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Words:
    """Word numbers of both parts, and how many words there are."""

    train: npt.NDArray[np.int64]
    valid: npt.NDArray[np.int64]
    vocabulary: int


def read_cifar10(folder: Path) -> Images:
    """Reads CIFAR-10.

    Raises:
        InputError: The folder holds neither version whole, or a file is not of its format.
    """
    names = [f"data_batch_{i}" for i in range(1, 6)]
    for suffix, read in ((".bin", _read_binary), ("", _read_pickle)):
        if (folder / f"test_batch{suffix}").is_file():
            parts = [read(_existing(folder / f"{name}{suffix}")) for name in names]
            train = _scaled(np.concatenate([p for p, _ in parts])), np.concatenate([c for _, c in parts])
            pixels, classes = read(folder / f"test_batch{suffix}")
            return Images(train, (_scaled(pixels), classes))
    raise InputError(f"no CIFAR-10 in {folder}: expected data_batch_1.bin to data_batch_5.bin and test_batch.bin, or the same without .bin")


def read_wikitext2(folder: Path) -> Words:
    """Reads WikiText-2.

    Raises:
        InputError: A file is missing or empty.
    """
    train, valid = (_existing(folder / f"wiki.{part}.tokens").read_text(encoding="utf-8") for part in ("train", "valid"))
    parts = [[word for line in text.splitlines() for word in (*line.split(), "<eos>")] for text in (train, valid)]
    if not all(parts):
        raise InputError(f"{folder}: wiki.train.tokens and wiki.valid.tokens must hold words")
    index = {word: i for i, word in enumerate(sorted({_UNKNOWN, *parts[0]}))}
    ids = [np.array([index.get(word, index[_UNKNOWN]) for word in words], dtype=np.int64) for words in parts]
    return Words(ids[0], ids[1], len(index))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"no file {path}")
    return path


def _read_binary(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    if not len(data) or len(data) % (IMAGE_BYTES + 1):
        raise InputError(f"{path} is not CIFAR-10's binary version: {len(data)} bytes are no multiple of {IMAGE_BYTES + 1}")
    rows = data.reshape(-1, IMAGE_BYTES + 1)
    return _checked(path, rows[:, 1:], rows[:, 0].astype(np.int64))


def _read_pickle(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="bytes").load()
        pixels, classes = np.asarray(content[b"data"], dtype=np.uint8), np.asarray(content[b"labels"], dtype=np.int64)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not CIFAR-10's Python version: {error}") from None
    return _checked(path, pixels, classes)


def _checked(
    path: Path, pixels: npt.NDArray[np.uint8], classes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    if pixels.ndim != 2 or pixels.shape != (len(classes), IMAGE_BYTES) or classes.max(initial=0) > 9:
        raise InputError(f"{path} does not hold rows of {IMAGE_BYTES} pixels, each with a class from 0 to 9")
    return pixels, classes


def _scaled(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    mean, deviation = (np.array(v, dtype=np.float32)[:, None, None] for v in (_MEAN, _DEVIATION))
    return np.asarray((pixels.reshape(-1, 3, 32, 32).astype(np.float32) / 255 - mean) / deviation, dtype=np.float32)


class _Arrays(pickle.Unpickler):
    """Lets nothing out of a pickle but arrays and plain values: a pickle can otherwise run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


READERS: Mapping[str, Any] = {"resnet50-cifar10": read_cifar10, "gpt2-wikitext2": read_wikitext2}
"""Reader of each job's data."""
