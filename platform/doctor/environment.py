"""Are the installed versions and the devices sound?"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from segadapt.platform.doctor.findings import Examination, Finding, fault

_PACKAGES = ("ray", "torch", "torchvision", "optuna", "mlflow")


# Environment.


def environment_findings(what: Examination) -> Iterator[Finding]:
    """Compare the installed versions with what segadapt is made for, and look at the devices."""
    about = importlib.metadata.metadata("segadapt")
    python = platform.python_version()
    if Version(python) not in SpecifierSet(about["Requires-Python"]):
        yield fault("environment", f"Python {python}", f"must be {about['Requires-Python']}", "Use another Python")
    versions = {name: _version(name) for name in _PACKAGES}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    text = f"Python {python}, segadapt {importlib.metadata.version('segadapt')}, {shown}"
    yield Finding("environment", "ok", text)
    bounds = [Requirement(text) for text in importlib.metadata.requires("segadapt") or () if "extra ==" not in text]
    for bound in bounds:
        installed = _version(bound.name)
        if installed is None or not bound.specifier.contains(installed, prereleases=True):
            yield fault(
                "environment",
                f"{bound.name} {installed or 'is missing'}",
                f"segadapt {importlib.metadata.version('segadapt')} is made for {bound.name}{bound.specifier}",
                f"`pip install '{bound.name}{bound.specifier}'`, or `uv sync`",
            )
    yield from _devices()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            yield Finding(
                "environment",
                "warning",
                "This machine has an NVIDIA driver, but torch uses no GPU",
                f"torch {torch.__version__} is built for CUDA {torch.version.cuda or 'none'}, or no GPU is visible",
                "Look at `nvidia-smi` and CUDA_VISIBLE_DEVICES; install a torch that suits the driver",
            )
        else:
            yield Finding("environment", "ok", f"No GPU; {os.cpu_count()} CPUs")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        name = f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
            free = torch.cuda.mem_get_info(index)[0] / 2**30
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            yield fault("environment", f"{name} cannot compute", reason, "Free it, or hide it by CUDA_VISIBLE_DEVICES")
        else:
            yield Finding("environment", "ok", f"{name}, {free:.0f} GiB free, CUDA {torch.version.cuda}")
