"""Compiling the kernels at their first use, once for each machine's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

from vocalnet.checkpoints.fetch import cache_folder

SOURCES = Path(__file__).parent
FLAGS = ["-std=c11", "-O3", "-fPIC", "-shared", "-fopenmp", "-mprefer-vector-width=512", "-mfma"]
FLAGS += ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]

log = logging.getLogger(__name__)


def _flags() -> list[str] | None:
    """How to compile for this machine; None where the kernels do not run: they need AVX-512 with VNNI."""
    capable = torch.backends.cpu.get_cpu_capability() == "AVX512"
    vnni = getattr(torch.cpu, "_is_vnni_supported", bool)
    if not (capable and vnni()):
        return None
    bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return FLAGS + ["-mavx512bf16"] * bf16()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they do not run, no C compiler is found, or VOCALNET_NATIVE is 0.

    Without them everything works by PyTorch's own operators.
    """
    flags = _flags()
    if flags is None or os.environ.get("VOCALNET_NATIVE") == "0":
        return None
    command = shlex.split(os.environ.get("CC", "")) or [shutil.which("gcc") or shutil.which("clang") or ""]
    if not shutil.which(command[0]):
        log.info("no C compiler found: the speech decoder and the LLM run on PyTorch's own operators, which is slower")
        return None
    try:
        return ctypes.CDLL(str(_compiled([*command, *flags])))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.warning("the kernels do not compile here, PyTorch's operators take their place: %s", said.strip()[:300])
        return None


def _compiled(command: list[str]) -> Path:
    """The library's file, compiled unless it is there; safe from several processes at once."""
    files = sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")])
    content = b"".join(file.read_bytes() for file in files) + " ".join(command).encode()
    target = cache_folder() / "native" / f"kernels-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_file():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                made = Path(folder) / target.name
                subprocess.run(
                    [*command, str(SOURCES / "kernels.c"), "-o", str(made), "-lm"],
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=120,
                )
                made.replace(target)
    return target
