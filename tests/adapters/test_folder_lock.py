"""The lock of a folder is given back wherever an interruption comes."""

import os
import sys

import pytest
from interruptions import is_interrupted, lines_of

from lora.adapters import saving

fcntl = saving.fcntl if sys.platform != "win32" else None
pytestmark = pytest.mark.skipif(fcntl is None, reason="Windows locks no folders")


def is_free(folder):
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def test_ctrl_c_at_any_line_gives_the_lock_back(tmp_path):
    def write():
        with saving.alone_in(tmp_path):
            assert not is_free(tmp_path)

    lines = lines_of(write)
    unlocking = [n for n, (code, _) in enumerate(lines) if code.co_name == "_unlock"]
    assert len(unlocking) > 3
    for n in unlocking:
        assert is_interrupted(write, n)
        assert is_free(tmp_path), lines[n]
