"""Freed memory stays with the process: counted in page faults, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading, torch
from diffray.model.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

net = torch.nn.Sequential(*[torch.nn.Conv2d(32, 32, 3, padding=1) for _ in range(4)])

@torch.inference_mode()
def work():
    for _ in range(20):
        net(torch.zeros(8, 32, 32, 32))

thread = threading.Thread(target=work)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told")
def test_buffers_are_taken_again_without_page_faults() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", PROGRAM, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < faults("leave") / 5
