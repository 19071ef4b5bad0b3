"""The comparison of all runs: which is best, in what they differ, their losses and their samples side by side.

Needs every run trained and, where it has sample prompts, pictured.
Makes results/compare/runs.tsv, report.html and, where there are pictures, samples.png. Where a run fails there is none of
this; what the others came to is compared in results/compare/so_far then (report.smk).
"""


localrules:
    compare_runs,


rule compare_runs:
    input:
        trained=[TRAINED.replace("{run}", run) for run in RUNS],
        resolved=[f"results/train/{run}/resolved.yaml" for run in RUNS],
        sheets=sheets(),
    output:
        table="results/compare/runs.tsv",
        report="results/compare/report.html",
        samples=["results/compare/samples.png"] if sheets() else [],
    log:
        "results/logs/compare_runs.log",
    conda:
        "../environment.yml"
    params:
        runs=list(RUNS),
        folder=lambda wildcards, output: str(Path(output.table).parent),
    message:
        "compare_runs: rank the runs"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage compare_runs --log {log:q} -- \
            python "$SCRIPTS"/compare_runs.py {params.runs:q} --output_dir {params.folder:q}
        """
