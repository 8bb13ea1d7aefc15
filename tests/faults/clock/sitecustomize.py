"""A wall clock that a test can move, for every Python process that has this folder on its path.

TEST_CLOCK names a file of eight bytes: nanoseconds (little-endian, signed) to add to what the clock says.
"""

import mmap
import os
import struct
import time

if "TEST_CLOCK" in os.environ:
    with open(os.environ["TEST_CLOCK"], "rb") as file:
        _offset = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    _true_ns = time.time_ns

    def _time_ns() -> int:
        return _true_ns() + int(struct.unpack_from("<q", _offset)[0])

    def _time() -> float:
        return _time_ns() / 1e9

    time.time_ns, time.time = _time_ns, _time
