"""Where jobs go to a scheduler: nothing is submitted before the jobs of a Snakemake that was killed have ended, and
none is waited for that the scheduler has lost."""

import shutil

from qwen_image.earlier_jobs import wait_for_earlier_jobs
from qwen_image.lost_jobs import notice_lost_jobs

if jobstep := sys.modules.get("snakemake_executor_plugin_slurm_jobstep"):
    # SLURM signals every process of a job's step and, once the first one has ended, kills the others. So nothing between
    # SLURM and the stage may listen; run_stage.py and the training take their signals nevertheless.
    jobstep.Executor.get_job_exec_prefix = lambda executor, job: (
        "trap '' TERM USR1" if executor.workflow.executor_settings.pass_command_as_script else ""
    )


onstart:
    if not workflow.local_exec:
        if shutil.which("sacct") is None or getattr(workflow.executor_settings, "no_account", False):
            # snakemake-executor-plugin-slurm 2.8.0 would ask sacct for one all the same, and fail where there is none
            workflow.scheduler._executor._fallback_account_arg = ""
        if plugin := sys.modules.get("snakemake_executor_plugin_slurm"):
            notice_lost_jobs(workflow.scheduler._executor, plugin)
            if age := plugin.get_min_job_age():
                # asked while SLURM's controller is away, it would turn from squeue to sacct, on many clusters for good
                plugin.get_min_job_age = lambda: age
        # Snakemake's marks of jobs that were begun: there are none yet of this run
        if any(os.scandir(".snakemake/incomplete")):
            wait_for_earlier_jobs(workflow.workdir_init, lambda text: print(text, file=sys.stderr, flush=True))
