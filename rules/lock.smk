"""Proof of what was made from what: the lock, and its verification.

`snakemake lock` makes what is not made yet, then writes dataset.lock: every hash, version and setting, without a time or
a machine path, to be kept under version control. `snakemake verify` reads everything again and says what differs. It has
no inputs on purpose: nothing is made or mended before it has looked. Neither has an output that Snakemake would remove
before, or take for up to date.
"""

LOCK = "dataset.lock"


localrules:
    lock,
    verify,


rule lock:
    input:
        final_targets(),
    log:
        "results/logs/lock.log",
    conda:
        "../environment.yml"
    params:
        config=lambda wildcards: CONFIG_JSON,
        lock=LOCK,
    message:
        "lock: write down what everything was made from"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage lock --log {log:q} -- \
            python "$SCRIPTS"/lock_dataset.py --config_json {params.config:q} --lock {params.lock:q}
        """


rule verify:
    log:
        "results/logs/verify.log",
    conda:
        "../environment.yml"
    params:
        config=lambda wildcards: CONFIG_JSON,
        lock=LOCK,
    message:
        "verify: compare everything with the lock"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage verify --log {log:q} -- \
            python "$SCRIPTS"/verify_lock.py --config_json {params.config:q} --lock {params.lock:q}
        """
