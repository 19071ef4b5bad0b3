"""A project on which the real Snakemake ran once, and copies of it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pytest
from demo_project import Project, Result

from qwen_image.files import lock


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id, python) -> tuple[Project, Result]:
    """A project whose first run is done, once for all processes that run tests, by the environment's own python.

    Do not change it: copy it.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "finished"
    project, told = Project(folder / "project"), folder / "result.json"
    with lock(folder.with_suffix(".lock")):
        if not told.exists():
            project.folder.mkdir(parents=True)
            project.configure()
            result = project.run(preexec_fn=lambda: os.umask(0o022))
            assert result.code == 0, result.text
            told.write_text(json.dumps(asdict(result)))
    return Project(project.folder, python), Result(**json.loads(told.read_text()))


@pytest.fixture
def project(finished, tmp_path) -> Project:
    """A copy of the finished project."""
    return finished[0].copy(tmp_path / "project")
