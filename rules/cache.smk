"""The two caching stages. Everything that is trained on passes through them; there is no switch to go without.

Needs the dataset's images, captions, the VAE and the text encoder.
Makes results/manifests/{DATASET}/latents.tsv and text_encoder_outputs.tsv, each with the table of rejects and a digest
of the manifest beside it; the cache files themselves lie in the datasets' cache directories and are their own memory.

The stages are checkpoints so that training is looked at again once the manifests are there: a stage that ran and found
nothing to encode leaves the manifest's content, and with it the LoRA, as it was.
"""


checkpoint cache_latents:
    input:
        checked=ancient(f"results/check/{DATASET}.txt"),
        images=lambda wildcards: watched(image_files()),
        vae=lambda wildcards: watched(vae_files()),
    output:
        manifest=transient(f"results/manifests/{DATASET}/latents.tsv", KEEP_LATENTS),
        digest=transient(f"results/manifests/{DATASET}/latents.sha256", KEEP_LATENTS),
        rejects=f"results/manifests/{DATASET}/latents.rejects.tsv",
    log:
        f"results/logs/cache_latents/{DATASET}.log",
    benchmark:
        f"results/benchmarks/cache_latents/{DATASET}.tsv"
    conda:
        "../environment.yml"
    threads: 8
    resources:
        gpu=uses_gpu(RESOLVED["caching_latent_device"]),
    message:
        "cache_latents: encode new and changed images with the VAE"
    params:
        dataset_config=RESOLVED["dataset_config"],
        vae=RESOLVED["vae"],
        version=f"{PREPROCESSING_VERSION}.{LATENT_ENCODER_VERSION}",
        settings=lambda wildcards: dataset_settings(*LATENT_SETTINGS),
        unwatched=lambda wildcards: unwatched([*image_files(), *vae_files()]),
        on_bad_item=RESOLVED["on_bad_item"],
        switches=switches(
            skip_existing=RESOLVED["caching_latent_skip_existing"],
            keep_cache=KEEP_LATENTS,
        ),
    shell:
        r"""
        python {SCRIPTS:q}/run_stage.py --stage cache_latents --log {log:q} -- \
            python {SCRIPTS:q}/qwen_image_cache_latents.py \
                --dataset_config {params.dataset_config:q} \
                --vae {params.vae:q} \
                --manifest {output.manifest:q} \
                --rejects {output.rejects:q} \
                --on_bad_item {params.on_bad_item} \
                {params.switches} \
                {LATENT_SPEED:q}
        """


checkpoint cache_text_encoder_outputs:
    input:
        checked=ancient(f"results/check/{DATASET}.txt"),
        captions=lambda wildcards: watched(caption_files()),
        text_encoder=lambda wildcards: watched(text_encoder_files()),
    output:
        manifest=transient(
            f"results/manifests/{DATASET}/text_encoder_outputs.tsv", KEEP_TEXTS
        ),
        digest=transient(
            f"results/manifests/{DATASET}/text_encoder_outputs.sha256", KEEP_TEXTS
        ),
        rejects=f"results/manifests/{DATASET}/text_encoder_outputs.rejects.tsv",
    log:
        f"results/logs/cache_text_encoder_outputs/{DATASET}.log",
    benchmark:
        f"results/benchmarks/cache_text_encoder_outputs/{DATASET}.tsv"
    conda:
        "../environment.yml"
    threads: 8
    resources:
        gpu=uses_gpu(RESOLVED["caching_teo_device"]),
    message:
        "cache_text_encoder_outputs: encode new and changed captions with the text encoder"
    params:
        dataset_config=RESOLVED["dataset_config"],
        text_encoder=RESOLVED["caching_teo_text_encoder"],
        tokenizer=options(tokenizer=RESOLVED["tokenizer"]),
        version=TEXT_ENCODER_VERSION,
        settings=lambda wildcards: dataset_settings(*TEXT_SETTINGS),
        members=lambda wildcards: items_digest(),
        unwatched=lambda wildcards: unwatched([*caption_files(), *text_encoder_files()]),
        on_bad_item=RESOLVED["on_bad_item"],
        switches=switches(
            fp8_vl=RESOLVED["caching_teo_fp8_vl"],
            skip_existing=RESOLVED["caching_teo_skip_existing"],
            keep_cache=KEEP_TEXTS,
        ),
    shell:
        r"""
        python {SCRIPTS:q}/run_stage.py --stage cache_text_encoder_outputs --log {log:q} -- \
            python {SCRIPTS:q}/qwen_image_cache_text_encoder_outputs.py \
                --dataset_config {params.dataset_config:q} \
                --text_encoder {params.text_encoder:q} \
                {params.tokenizer:q} \
                --manifest {output.manifest:q} \
                --rejects {output.rejects:q} \
                --on_bad_item {params.on_bad_item} \
                {params.switches} \
                {TEXT_SPEED:q}
        """
