"""What this installation is and what it will run on."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from typing import TYPE_CHECKING

from dsv4_jax.command_line import compilation_cache
from dsv4_jax.command_line.devices import device_problem, settings_problem

if TYPE_CHECKING:
    from dsv4_jax.command_line.transports import Choice

PACKAGES = (
    "dsv4_jax",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "ml_dtypes",
    "tokenizers",
    "huggingface_hub",
)
OPTIONAL_PACKAGES = ("libtpu",)
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator or CPU as JAX sees it."""

    platform: str
    kind: str
    memory_bytes: int | None  # None where the backend does not tell


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Result of `diagnose`; `problems` names what will not work."""

    python: str
    system: str
    cpu_count: int
    memory_bytes: int | None
    versions: dict[str, str]
    default_backend: str
    devices: tuple[Device, ...]
    kernels: str
    compilation_cache: str  # its directory, or why there is none
    cached_programs: int
    free_disk_bytes: int | None  # where compiled programs are kept
    problems: tuple[str, ...]
    transports: "tuple[Choice, ...]" = ()  # of tokens to their experts, on the mesh that was asked about

    def as_plain(self) -> dict[str, object]:
        """JSON-ready values."""
        plain = dataclasses.asdict(dataclasses.replace(self, transports=()))
        return plain | {"transports": [each.as_plain() for each in self.transports]}

    def lines(self) -> list[str]:
        """The same for people."""
        devices = [
            f"{device.kind} ({device.platform}"
            + (f", {device.memory_bytes / GIB:.1f} GiB" if device.memory_bytes else "")
            + ")"
            for device in self.devices
        ]
        memory = f", {self.memory_bytes / GIB:.1f} GiB memory" if self.memory_bytes else ""
        rows = {
            "python": f"{self.python} on {self.system}, {self.cpu_count} CPUs{memory}",
            **{name: version for name, version in self.versions.items() if version != "missing"},
            "backend": self.default_backend,
            "devices": f"{len(devices)}: {', '.join(sorted(set(devices)))}",
            "kernels": self.kernels,
            "compiled": f"{self.cached_programs} programs kept in {self.compilation_cache}",
        }
        if self.free_disk_bytes is None:
            rows["compiled"] = f"programs are not kept: {self.compilation_cache}"
        else:
            rows["disk"] = f"{self.free_disk_bytes / GIB:.1f} GiB free there"
        for each in self.transports:
            name = f"{each.tokens} tokens"
            rows[name] = f"to experts on {each.devices} devices, {each.link} links: {each.line()}"
        width = max(map(len, rows))
        return [f"{name:<{width}}  {text}" for name, text in rows.items()]


def diagnose() -> Diagnosis:
    """Looks at versions, devices and disk. Compiles and runs one addition on the default device."""
    problems = []
    versions = {name: _version(name) for name in PACKAGES}
    for name, version in versions.items():
        if version == "missing" and name not in OPTIONAL_PACKAGES:
            problems.append(f"{name} is not installed")
    backend, devices = "none", ()
    if problem := device_problem():
        problems.append(problem)
    else:
        backend, devices = _devices()
        if not _adds():
            problems.append(f"{backend}: 1 + 1 is not 2 on the default device")
    where, num_programs, free = _kept_programs()
    return Diagnosis(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_host_memory(),
        versions=versions,
        default_backend=backend,
        devices=devices,
        kernels="none" if settings_problem() else _kernels(),
        compilation_cache=where,
        cached_programs=num_programs,
        free_disk_bytes=free,
        problems=tuple(problems),
    )


def _devices() -> tuple[str, tuple[Device, ...]]:
    import jax

    devices = (Device(each.platform, each.device_kind, _device_memory(each)) for each in jax.devices())
    return jax.default_backend(), tuple(devices)


def _adds() -> bool:
    import jax
    import jax.numpy as jnp

    return int(jax.jit(lambda x: x + 1)(jnp.int32(1))) == 2


def _kept_programs() -> tuple[str, int, int | None]:
    """The directory of compiled programs, their number, and the bytes free there; or why there is none."""
    try:
        cache = compilation_cache.writable(compilation_cache.default_directory())
        return str(cache), sum(1 for _ in cache.glob("*-cache")), shutil.disk_usage(cache).free
    except (compilation_cache.NoCache, OSError) as why:
        return str(why), 0, None


def _kernels() -> str:
    """What computes each operation by default, and what can be asked for instead."""
    from dsv4_jax.model.operations import operations
    from dsv4_jax.numerics.policy import KERNELS, Policy

    default = Policy.of()
    others = "; ".join(f"{name!r}: {what}" for name, what in KERNELS.items() if name != default.kernels)
    chosen = ", ".join(f"{each.name}: {each.runs()}" for each in operations(default).each())
    return f"{KERNELS[default.kernels]} ({chosen}; load(..., kernels=) also takes {others})"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _device_memory(device: object) -> int | None:
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
