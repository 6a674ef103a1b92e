"""Compiling the kernels at their first use, once for each machine's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock

from vocalnet.checkpoints.fetch import cache_folder

SOURCES = Path(__file__).parent
FLAGS = ["-std=c11", "-O3", "-fPIC", "-shared", "-fopenmp", "-pthread", "-mprefer-vector-width=512", "-mfma"]
FLAGS += ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
KEPT = 4
"""Compiled libraries that stay in the cache; older ones are removed."""

log = logging.getLogger(__name__)


def _flags() -> list[list[str]]:
    """How to compile for this machine, best first; nothing where the kernels do not run: they need AVX-512 VNNI."""
    capable = torch.backends.cpu.get_cpu_capability() == "AVX512"
    vnni = getattr(torch.cpu, "_is_vnni_supported", bool)
    if not (capable and vnni()):
        return []
    bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return [[*FLAGS, "-mavx512bf16"], FLAGS] if bf16() else [FLAGS]  # gcc 9 does not know bf16


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they do not run or compile, no C compiler is found, or VOCALNET_NATIVE is 0.

    Without them everything works by PyTorch's own operators.
    """
    choices = _flags()
    if not choices or os.environ.get("VOCALNET_NATIVE") == "0":
        return None
    command = os.environ.get("CC", "").split() or [shutil.which("gcc") or shutil.which("clang") or ""]
    if not shutil.which(command[0]):
        log.info("no C compiler found: the speech decoder and the LLM run on PyTorch's own operators, which is slower")
        return None
    said = ""
    for flags in choices:
        try:
            return _loaded([*command, *flags])
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
    log.warning("the kernels do not compile here, PyTorch's operators take their place: %s", said[:300])
    return None


def kernel(name: str, *arguments: Any) -> Any:
    """A function of the library that takes `arguments` (types of ctypes) and returns an int."""
    kernels = library()
    if kernels is None:
        raise RuntimeError("the kernels do not run here; ask vocalnet.native.available() first")
    function = kernels[name]  # an object of its own at every call
    function.argtypes = arguments
    return function


class Connected:
    """Something that holds addresses beside what lies there. Copies and files get the latter and connect anew."""

    ADDRESSES: ClassVar[tuple[str, ...]]
    """The attributes that `_connect` makes."""

    def _connect(self) -> None:
        """Tells the kernel where everything lies."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in self.ADDRESSES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connect()


def _loaded(command: Sequence[str]) -> ctypes.CDLL:
    """The library from the cache, compiled unless it is there; from a passing folder where the cache is read-only."""
    try:
        return ctypes.CDLL(str(_cached(command)))
    except (PermissionError, RuntimeError):
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(_compiled(command, Path(folder) / "kernels.so")))


def _cached(command: Sequence[str]) -> Path:
    """The library's file in the cache; safe from several processes at once."""
    files = sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")])
    about = shlex.join([*command, *platform.libc_ver()])
    content = b"".join(file.read_bytes() for file in files) + about.encode()
    folder = cache_folder() / "native"
    target = folder / f"kernels-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not target.is_file():
            with tempfile.TemporaryDirectory(dir=folder) as passing:
                _compiled(command, Path(passing) / target.name).replace(target)
            for old in sorted(folder.glob("kernels-*.so"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
                old.unlink()
    return target


def _compiled(command: Sequence[str], target: Path) -> Path:
    """Compiles into a file."""
    subprocess.run(
        [*command, str(SOURCES / "kernels.c"), "-o", str(target), "-lm"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return target
