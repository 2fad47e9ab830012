"""Beside a copy of llama-cpp-python's own tests: leaves out those whose model would be downloaded."""

from __future__ import annotations

from typing import Any

import pytest

UPSTREAM = "model_path"  # how the fixtures that download end


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    downloads = [item for item in items if any(name.endswith(UPSTREAM) for name in item.fixturenames)]
    downloads += [item for item in items if "model_path_fixture" in item.fixturenames]
    config.hook.pytest_deselected(items=downloads)
    items[:] = [item for item in items if item not in downloads]
