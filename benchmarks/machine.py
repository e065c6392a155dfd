"""Where and with what a benchmark runs."""

from __future__ import annotations

import datetime
import os
import platform
import resource
from importlib.metadata import version
from pathlib import Path

import torch


def machine() -> dict[str, str]:
    """What the results say of it."""
    model = [line.split(":")[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")]
    versions = (f"{name} {version(name)}" for name in ("torch", "numpy", "loralib", "peft", "transformers", "lora"))
    device = torch.get_default_device()
    card = {"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    cpu = f"{(model or [platform.processor()])[0]}, {torch.backends.cpu.get_cpu_capability()}"
    return card | {
        "CPU": f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(versions),
        "load at the start": f"{os.getloadavg()[0]:.1f}",
        "date": datetime.date.today().isoformat(),
    }


def only(words: str) -> str:
    """The option that chose the cases, as it was typed."""
    return f' --only "{words}"' if words else ""


def peak_mib() -> float:
    """The most memory that this process has had. (What `getrusage` says begins with the parent's.)"""
    peak = [line.split()[1] for line in _read("/proc/self/status") if line.startswith("VmHWM")]
    return int(peak[0]) / 2**10 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
