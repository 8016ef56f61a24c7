"""Builds the executor once a run; without nvcc its tests are skipped."""

from types import ModuleType

import pytest

from tests.cuda_on_cpu import build


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if build.find_nvcc() is None:
        reason = "nvcc is not in K25_CUDA_HOME/bin, CUDA_HOME/bin or PATH: there is no PTX to run"
        for item in items:
            if "cuda_on_cpu" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def executor() -> ModuleType:
    """The kernels of csrc in both executors."""
    return build.executor_module()
