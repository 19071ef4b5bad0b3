"""The cluster that these tests share. Without SLURM they skip, or fail where CI=true or REQUIRE_SLURM=1 wants them."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from cluster.driving import Project, Scene
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


@pytest.fixture(scope="session")
def played(request, cluster, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """What comes of the scenarios of the selected tests, by name. They run side by side from the first test on: most of
    a scenario's time goes by between two looks at its jobs."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    scenarios = [chosen["scenario"] for chosen in parameters if "scenario" in chosen]
    folder = tmp_path_factory.mktemp("scenarios")
    pool = ThreadPoolExecutor(len(scenarios) + 1)
    finished = pool.submit(_finished, Project(folder / "finished", cluster))
    scenes = {scenario: Scene(cluster, finished, folder / scenario.__name__) for scenario in scenarios}
    yield {scenario.__name__: pool.submit(scenario, scene) for scenario, scene in scenes.items()}
    pool.shutdown(wait=False, cancel_futures=True)


def _finished(project: Project) -> Project:
    """Run the workflow on this machine, without SLURM; it is what all scenarios are compared with."""
    project.configure()
    project.run_locally()
    return project
