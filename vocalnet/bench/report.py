"""What a measurement was made on, and how reports are printed and kept."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from vocalnet.native import available


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "kernels": available(),
    }


def peak_memory_gb() -> float:
    """Peak resident memory of this process in GB (10⁹ bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def format_report(report: dict[str, Any]) -> str:
    """The report as aligned lines."""
    lines: list[str] = []

    def show(values: dict[str, Any], indent: int) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                lines.append(" " * indent + key)
                show(value, indent + 2)
            else:
                lines.append(" " * indent + f"{key:<{34 - indent}} {value}")

    show(report, 0)
    return "\n".join(lines)
