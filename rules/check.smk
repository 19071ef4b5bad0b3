"""The check stage: configuration, dataset and checkpoints, before any work is done.

Needs the dataset files, the table of runs and the checkpoints. Makes results/check/{DATASET}.txt, which says what the
datasets hold.
The same check is made whenever Snakemake reads the configuration (common.smk), so nothing starts on a bad one; this rule
writes it down, ahead of the other stages. Single items that cannot be used are named here and fail the caching stages
once the others are cached.
"""


localrules:
    check_config,


rule check_config:
    input:
        datasets=lambda wildcards: watched(DATASET_FILES),
        table=watched([config[TABLE]] if config.get(TABLE) else []),
        demo=lambda wildcards: after_demo(),
    output:
        report=f"results/check/{DATASET}.txt",
    log:
        f"results/logs/check/{DATASET}.log",
    priority: 100
    conda:
        "../environment.yml"
    params:
        config=lambda wildcards: CONFIG_JSON,
        members=lambda wildcards: [members(file, wildcards) for file in DATASET_FILES],
    message:
        "check_config: check the configuration, the dataset and the checkpoints"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage check_config --log {log:q} -- \
            python "$SCRIPTS"/check_config.py --config_json {params.config:q} --report {output.report:q}
        """
