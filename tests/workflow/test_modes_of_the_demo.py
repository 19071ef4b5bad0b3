"""The files of a run are as readable as the umask says, neither more nor less."""

import stat


def test_every_file_of_a_run_has_the_mode_that_the_umask_gives(finished):
    """The usual umask, 022: a team can read it all, and nobody else can write."""
    project, _ = finished
    paths = [path for path in project.folder.rglob("*") if ".snakemake" not in path.parts and not path.is_symlink()]
    assert len(paths) > 50
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert {path: oct(mode) for path, mode in modes.items() if mode != (0o755 if path.is_dir() else 0o644)} == {}


def test_what_snakemake_notes_is_writable_by_none_outside_the_group(finished):
    project, _ = finished
    paths = [path for path in (project.folder / ".snakemake").rglob("*") if not path.is_symlink()]
    assert [path for path in paths if path.stat().st_mode & stat.S_IWOTH] == []
