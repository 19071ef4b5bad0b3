"""The cluster that these tests share. Without SLURM they skip, or fail where CI=true or REQUIRE_SLURM=1 wants them."""

import os
from collections.abc import Iterator

import pytest
from cluster.slurm import Cluster, missing_programs, throwaway_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if missing := missing_programs():
        reason = f"SLURM is not installed ({', '.join(missing)}); on Debian: bash .ci/install_slurm.sh"
        if os.environ.get("CI") == "true" or os.environ.get("REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with throwaway_cluster() as running:
        yield running
