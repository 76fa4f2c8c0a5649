"""What the project promises about itself: its version, its tasks, its Makefile."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import gateway

ROOT = Path(__file__).resolve().parents[1]


def test_version_is_that_of_pyproject() -> None:
    try:
        installed = importlib.metadata.version("nbd-gateway")
    except importlib.metadata.PackageNotFoundError:
        assert gateway.__version__ == "0+checkout"
        pytest.skip("nbd-gateway is not installed, so it has no version to compare")
    with (ROOT / "pyproject.toml").open("rb") as file:
        written = tomllib.load(file)["project"]["version"]
    assert gateway.__version__ == installed == written


def startable_tasks() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Our functions and methods for `nursery.start`: those that take `task_status`."""
    for info in pkgutil.walk_packages(gateway.__path__, "gateway."):
        if info.name == "gateway.__main__":
            continue
        module = importlib.import_module(info.name)
        for holder in (module, *(c for c in vars(module).values() if inspect.isclass(c))):
            for function in vars(holder).values():
                if inspect.iscoroutinefunction(function) and function.__module__ == info.name:
                    if "task_status" in inspect.signature(function).parameters:
                        yield f"{info.name}.{function.__qualname__}", function


@pytest.fixture
def abc_of_trio_typing() -> type:
    # In a fixture, because pytest-trio drops the reason of a skip inside an async test.
    module = pytest.importorskip(
        "trio_typing", reason="trio-typing is not installed (extra typing-compat)"
    )
    abc: type = module.TaskStatus
    return abc


async def test_task_status_is_that_of_trio_typing(abc_of_trio_typing: type) -> None:
    """Callers that know trio_typing.TaskStatus, its ABC, can start our tasks and check with it.

    Our tasks take what trio hands out: the constant when called directly, the nursery's own object
    when started. The ABC knows both by registration alone, so only running it can tell.
    """
    tasks = dict(startable_tasks())
    assert tasks, "no startable task found: has the argument another name now?"
    for name, task in tasks.items():
        parameter = inspect.signature(task).parameters["task_status"]
        assert str(parameter.annotation).startswith("trio.TaskStatus["), name
        assert isinstance(parameter.default, abc_of_trio_typing), name

    async def startable(*, task_status: trio.TaskStatus[object]) -> None:
        task_status.started(task_status)

    async with trio.open_nursery() as nursery:
        assert isinstance(await nursery.start(startable), abc_of_trio_typing)


def test_make_help_lists_every_target() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    shown = subprocess.run(
        ["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert re.findall(r"^make (\S+) ", shown, re.MULTILINE) == phony[1].split()
