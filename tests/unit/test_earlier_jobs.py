"""Waiting for the jobs that a killed Snakemake left in SLURM's queue."""

import pytest

from qwen_image import earlier_jobs

HERE, ELSEWHERE = "/shared/my project", "/shared/other"


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Put a squeue on the PATH that gives one prepared answer after the other, then an empty one; "!" fails."""

    def prepare(*texts):
        for number, text in enumerate(texts):
            (tmp_path / f"{number:02}.answer").write_text(text)

    squeue = tmp_path / "squeue"
    squeue.write_text(
        f"#!/bin/sh\nfor answer in {tmp_path}/*.answer; do\n[ -e $answer ] || exit 0\n"
        'text=$(cat $answer); rm $answer\n[ "$text" != ! ] || { echo refused >&2; exit 1; }\n'
        'printf "%s\\n" "$text"; exit 0\ndone\n'
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(earlier_jobs, "SECONDS_BETWEEN_LOOKS", 0)
    return prepare


def said():
    lines = []
    earlier_jobs.wait_for_earlier_jobs(HERE, lines.append)
    return lines


def test_jobs_of_this_folder_are_waited_for(answers, tmp_path):
    first, second = f"7|rule_train|{HERE}", f"8|rule_cache_latents_wildcards_1|{HERE}"
    answers(f"{first}\n{second}", second, second)
    lines = said()
    assert "queue: 7 8." in lines[0]
    assert lines[1].endswith("scancel 7 8")
    assert not list(tmp_path.glob("*.answer")), "it asked until none was left"


def test_a_job_that_came_later_is_not_waited_for(answers, tmp_path):
    answers(f"7|rule_train|{HERE}", f"9|rule_train|{HERE}", f"9|rule_train|{HERE}")
    said()
    assert len(list(tmp_path.glob("*.answer"))) == 1


@pytest.mark.parametrize("job", [f"7|rule_train|{ELSEWHERE}", f"7||{HERE}", f"7|my_own|{HERE}"])
def test_other_jobs_are_none_of_its_business(answers, job):
    answers(job)
    assert said() == []


def test_a_squeue_that_fails_is_asked_again(answers):
    answers("!", f"7|rule_train|{HERE}", "!", f"7|rule_train|{HERE}")
    lines = said()
    assert [line for line in lines if "refused" in line and "asking again" in line] == [lines[0], lines[3]]


def test_without_slurm_there_is_nothing_to_ask(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert said() == []
