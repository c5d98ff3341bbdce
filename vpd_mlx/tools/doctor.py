"""What this machine has, and whether its arithmetic is right."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE

from vpd_mlx import __version__
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.recipe import builtin_recipes, load_recipe
from vpd_mlx.sandbox import Limits, Sandbox
from vpd_mlx.tools.selftest import Check, checks

__all__ = ["Fact", "facts", "self_test"]

HUB_SECONDS = 5


@dataclass(frozen=True)
class Fact:
    """One line of the report; `remedy` is empty when nothing is wrong."""

    name: str
    value: str
    remedy: str = ""


def facts() -> Iterator[Fact]:
    """Versions, machine, memory, disk, sandbox, hub."""
    python = platform.python_version()
    yield Fact("python", python, "" if sys.version_info >= (3, 11) else "use Python 3.11 or newer")
    for name in ("mlx", "mlx-lm", "numpy", "transformers", "huggingface_hub"):
        yield Fact(name, version(name))
    yield Fact("vpd-mlx", __version__)
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()
    yield Fact("system", f"{system}, {platform.machine()}")
    device = mx.default_device()
    info = mx.device_info(device)
    name = str(info.get("device_name", platform.processor() or platform.machine()))
    on_gpu = device == mx.Device(mx.gpu)
    remedy = "" if on_gpu or sys.platform != "darwin" else "MLX finds no GPU: install the arm64 build of Python and mlx"
    yield Fact("device", f"{device}, {name}", remedy)
    yield from _memory()
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Fact("disk free here", f"{free:.1f} GB", "" if free > 1 else "free some space: checkpoints and logs need it")
    abilities = Sandbox(Limits(), unisolated=True).abilities
    layers = ", ".join(abilities.layers) or "no layer"
    yield Fact("sandbox for code", f"complete ({layers})" if not abilities.notice() else layers, abilities.notice())
    yield _hub()


def _memory() -> Iterator[Fact]:
    total, available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, None
    if Path("/proc/meminfo").exists():
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) / 2**20
    text = f"{total:.1f} GB" + ("" if available is None else f", {available:.1f} GB available")
    yield Fact("memory", text, "" if available is None or available > 2 else "close something: under 2 GB are left")
    info = mx.device_info(mx.default_device())
    if "max_recommended_working_set_size" in info:
        yield Fact("GPU working set", f"{int(info['max_recommended_working_set_size']) / 2**30:.1f} GB")


def _hub() -> Fact:
    if HF_HUB_OFFLINE:
        return Fact("hub", "offline mode (HF_HUB_OFFLINE)")
    try:
        HfApi().model_info("mlx-community/Qwen3-0.6B-4bit", timeout=HUB_SECONDS)
    except Exception as error:  # noqa: BLE001 - whatever fails, the hub is not reachable from here
        return Fact(
            "hub", f"not reachable ({type(error).__name__})", "models must be in the cache or in a local folder"
        )
    return Fact("hub", "reachable")


def self_test() -> tuple[list[Check], float]:
    """The numerics self-test on the embedded model: (checks, seconds)."""
    policy = Policy.load(load_recipe(builtin_recipes()["quickstart"]).model, LoraSettings(rank=4))
    start = time.perf_counter()
    return list(checks(policy)), time.perf_counter() - start
