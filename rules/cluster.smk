"""Where jobs go to a scheduler: nothing is submitted before the jobs of a Snakemake that was killed have ended."""

from qwen_image.earlier_jobs import wait_for_earlier_jobs


onstart:
    # Snakemake's marks of jobs that were begun: there are none yet of this run
    if not workflow.local_exec and any(os.scandir(".snakemake/incomplete")):
        wait_for_earlier_jobs(workflow.workdir_init, lambda text: print(text, file=sys.stderr, flush=True))
