"""Files have the modes that the umask gives them: nothing is open to others that should not be."""

import stat

import pytest
from odd_values import UMASK

pytestmark = pytest.mark.xdist_group("odd values")


def test_a_strict_umask_leaves_nothing_to_others(odd_run):
    """What Snakemake notes below .snakemake has its own modes, up to 660, whatever the umask."""
    own = [path for path in odd_run.written if ".snakemake" not in path.parts and not path.is_symlink()]
    assert len(own) > 50
    assert [(oct(path.stat().st_mode), path) for path in own if path.stat().st_mode & UMASK] == []
    assert [path for path in odd_run.written if path.lstat().st_mode & stat.S_IRWXO and not path.is_symlink()] == []
