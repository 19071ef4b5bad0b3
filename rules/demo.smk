"""The embedded demo: a small captioned dataset and three tiny checkpoints of the real model classes.

Needs nothing. Makes resources/demo/, only what is absent. A configuration that names none of its paths never runs it.
"""


checkpoint demo:
    output:
        # what is there stays as it is, whatever else is missing
        *map(update, DEMO_FILES),
    log:
        "results/logs/demo.log",
    conda:
        "../environment.yml"
    params:
        folder=lambda wildcards: DEMO,
    message:
        "demo: make the demo's pictures, captions and tiny checkpoints"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage demo --log {log:q} -- \
            python "$SCRIPTS"/make_demo.py --folder {params.folder:q}
        """
