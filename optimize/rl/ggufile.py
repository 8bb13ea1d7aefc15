"""The header of a GGUF file: metadata and the table of tensors.

The `gguf` package's own reader wraps each of a vocabulary's 262,144 words in numpy arrays (14 s for the demo model);
this one walks the bytes once (1 s). Versions 2 and 3 of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from collector.errors import BadInput

# Value type -> struct format; 8 is a string, 9 an array.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: its shape in row-major order, its ggml type, and where its bytes start."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUFFile:
    """A GGUF file, mapped: `metadata` by key, `tensors` by name, `bytes_of` a tensor."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._data[:4] != b"GGUF":
            raise BadInput(f"{path} is not a GGUF file")
        version, tensors, pairs = struct.unpack_from("<IQQ", self._data, 4)
        if version not in (2, 3):
            raise BadInput(f"{path} is GGUF version {version}; versions 2 and 3 are known")
        self._at = 24
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        self.tensors = {tensor.name: tensor for tensor in (self._tensor() for _ in range(tensors))}
        alignment = int(self.metadata.get("general.alignment", 32))
        self._start = -(-self._at // alignment) * alignment

    def bytes_of(self, tensor: Tensor, row_bytes: int) -> npt.NDArray[np.uint8]:
        """The raw blocks of a tensor as uint8 (rows, row_bytes); a vector is one row."""
        rows = int(np.prod(tensor.shape[:-1]))
        data = np.frombuffer(self._data, np.uint8, rows * row_bytes, self._start + tensor.offset)
        return data.reshape(rows, row_bytes)

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, count = self._scalar("<I"), self._scalar("<Q")
            return [self._value(inner) for _ in range(count)]
        return self._scalar(SCALARS[kind])

    def _tensor(self) -> Tensor:
        name = self._string()
        dimensions = [self._scalar("<Q") for _ in range(self._scalar("<I"))]
        kind, offset = self._scalar("<I"), self._scalar("<Q")
        return Tensor(name, tuple(reversed(dimensions)), kind, offset)
