"""The cluster, started once for all tests of this folder, or the reason why there is none."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slurm: needs root and Debian's SLURM packages; starts a cluster")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster() as started:
        yield started
