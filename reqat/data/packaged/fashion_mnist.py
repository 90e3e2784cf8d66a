"""Fashion-MNIST (arXiv 1708.07747): grey pictures of clothes, 28 x 28, ten balanced classes; 60,000 and 10,000.

The package has IDX files: a big-endian header of magic number and sizes, then bytes. Prepared: `train_images.npy` and
`test_images.npy`, uint8 [N, 28, 28]; `train_labels.npy` and `test_labels.npy`, uint8 [N], 0 to 9.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from reqat.config.errors import ReqatError
from reqat.data.packaged import Package, debian

CLASSES = 10
SIDE = 28
_IMAGES, _LABELS = 2051, 2049  # magic numbers: unsigned bytes in three axes, in one
_SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}

PACKAGE = Package(
    name="fashion-mnist",
    files={
        "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    },
    places=debian("/usr/share/datasets/fashion-mnist"),
    install="sudo apt install dataset-fashion-mnist",
    licence="MIT",
)


def prepare(out: Path, given: Path | None = None) -> None:
    """Write the four arrays into `out`. Raises `ReqatError` if the package is missing or damaged."""
    folder = PACKAGE.checked(given)
    for split, (stem, count) in _SPLITS.items():
        images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz", _IMAGES, (count, SIDE, SIDE))
        labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", _LABELS, (count,))
        if labels.max() >= CLASSES:
            raise ReqatError(f"{folder}: a label of {split} is {labels.max()}, and there are {CLASSES} classes.")
        np.save(out / f"{split}_images.npy", images)
        np.save(out / f"{split}_labels.npy", labels)


def load(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a split, `train` or `test`, of a prepared folder."""
    return tuple(np.load(folder / f"{split}_{what}.npy", allow_pickle=False) for what in ("images", "labels"))  # type: ignore[return-value]


def read_idx(path: Path, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a gzipped IDX file as uint8 of `shape`. Raises `ReqatError` for one of another kind or size."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ReqatError(f"{path}: not a whole gzip file ({error}); install the package again.") from None
    head = np.frombuffer(data[: 4 * (1 + len(shape))], ">u4")
    sizes, found = 4 * len(head), tuple(int(size) for size in head[1:])
    if not len(head) or head[0] != magic or found != shape or len(data) - sizes != int(np.prod(shape)):
        raise ReqatError(f"{path}: not an IDX file of shape {shape}, but {found}, {len(data)} bytes.")
    return np.frombuffer(data, np.uint8, offset=sizes).reshape(shape)
