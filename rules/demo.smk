"""The embedded demo: a small captioned dataset and three tiny checkpoints of the real model classes.

Needs nothing. Makes resources/demo/, only what is absent. A configuration that names none of its paths never runs it.
"""


checkpoint demo:
    output:
        dataset=f"{DEMO}/dataset.toml",
        dit=f"{DEMO}/dit.safetensors",
        vae=f"{DEMO}/vae.safetensors",
        text_encoder=f"{DEMO}/text_encoder/model.safetensors",
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
