"""What computes a run's numbers: packages, processor, devices, commit."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic

from ae_jax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""Those whose versions decide on the bits, or may."""


class Environment(pydantic.BaseModel):
    """As config.json has it: of the first session, and of each that differed."""

    versions: dict[str, str]
    device: dict[str, Any]
    git_commit: str | None = None
    date: str | None = None
    """Of a later session."""


def versions(*more: str) -> dict[str, str]:
    """Python's, this project's, and those of the packages under it and some more."""
    names = (*PACKAGES, *more)
    packages = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), "ae_jax": __version__, **packages}


def usable_cores() -> int:
    """Cores that this process may use; bits differ between one core and two."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo(field: str) -> str:
    """What Linux knows of the first core; elsewhere the processor's bare name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    return _cpuinfo("model name")


def compilation_cache_dir() -> Path:
    """The user's folder of compiled programs, for this jaxlib on this processor.

    Machine code for another processor's flags may not run, or round otherwise.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    flags = hashlib.sha256(_cpuinfo("flags").encode()).hexdigest()[:12]
    jaxlib = importlib.metadata.version("jaxlib")
    return Path(home) / "ae_jax" / f"xla-{jaxlib}-{flags}"


@functools.cache
def git_commit() -> str | None:
    """The commit of this code, ``-dirty`` if it differs; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            [*command, "--dirty", "--abbrev=40", "--match="],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return answer.stdout.strip()
    return None


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def return_freed_memory() -> None:
    """Give the system back what the C library keeps for later use; Linux's can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def here(device: dict[str, Any], *packages: str) -> Environment:
    """This process's.

    Args:
        device: ``kind`` and ``count`` of the accelerators.
        packages: whose versions count beside :data:`PACKAGES`.
    """
    return Environment(
        versions=versions(*packages),
        device={**device, "cpu_model": cpu_model(), "cpu_cores": usable_cores()},
        git_commit=git_commit(),
    )


def changes(before: Environment, now: Environment) -> list[str]:
    """What may change a run's bits: a text for each difference."""
    return [
        f"{part}.{name} {old.get(name)} → {value}"
        for part in ("versions", "device")
        for old, new in [(getattr(before, part), getattr(now, part))]
        for name, value in new.items()
        if old.get(name, value) != value  # an older version recorded less
    ]
