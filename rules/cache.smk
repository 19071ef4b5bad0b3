"""The two caching stages. Everything that is trained on passes through them; there is no switch to go without.

Needs the dataset's images, captions, the VAE and the text encoder.
Makes results/manifests/{DATASET}/latents.tsv and text_encoder_outputs.tsv, each with the table of rejects and a digest
of the manifest beside it; the cache files themselves lie in the datasets' cache directories and are their own memory.
Of an item with several captions the texts' manifest has a row, and the cache a file, a caption.
Each stage is `caching_shards` jobs. An item's shard is a hash of its key, so that a new or changed one concerns one job;
the shards' own manifests lie in shards/, and a cheap step merges them into one in the same order for any number.

Whatever the user wrote reaches a rule through a function: Snakemake takes no braces in it for wildcards then.
`gpu` is what a cluster is asked for, `local_gpu` keeps stages on one machine from sharing a GPU (profiles/default).
Device, batch size and workers are resources, not parameters: they have no bearing on what is made, so changing them runs
nothing again, and a profile may set them for a machine.
The merge steps are checkpoints so that training is looked at again once the manifests are there: a stage that ran and
found nothing to encode leaves the manifest's content, and with it the LoRA, as it was.
"""


localrules:
    merge_latents,
    merge_text_encoder_outputs,


wildcard_constraints:
    shard="|".join(map(str, range(1, SHARDS + 1))),


rule cache_latents:
    input:
        images=lambda wildcards: watched(image_files(wildcards)),
        vae=lambda wildcards: watched(vae_files()),
    output:
        manifest=transient(f"results/manifests/{DATASET}/shards/latents.{SHARD}.tsv", KEEP_LATENTS),
        rejects=transient(f"results/manifests/{DATASET}/shards/latents.{SHARD}.rejects.tsv", KEEP_LATENTS),
    log:
        f"results/logs/cache_latents/{DATASET}/{SHARD}.log",
    benchmark:
        f"results/benchmarks/cache_latents/{DATASET}/{SHARD}.tsv"
    conda:
        "../environment.yml"
    threads: 8
    resources:
        gpu=uses_gpu(RESOLVED["caching_latent_device"]),
        local_gpu=uses_gpu(RESOLVED["caching_latent_device"]),
        device=RESOLVED["caching_latent_device"] or "auto",
        batch_size=RESOLVED["caching_latent_batch_size"],
        num_workers=RESOLVED["caching_latent_num_workers"],
    params:
        dataset_config=lambda wildcards: RESOLVED["dataset_config"],
        vae=lambda wildcards: RESOLVED["vae"],
        version=f"{PREPROCESSING_VERSION}.{LATENT_ENCODER_VERSION}",
        settings=lambda wildcards: dataset_settings(*LATENT_SETTINGS),
        members=lambda wildcards: members(wildcards),
        stamp=lambda wildcards: stamp([*image_files(wildcards), *vae_files()]),
        num_shards=SHARDS,
        on_bad_item=RESOLVED["on_bad_item"],
        switches=switches(
            skip_existing=RESOLVED["caching_latent_skip_existing"],
            keep_cache=KEEP_LATENTS,
            deterministic=RESOLVED["deterministic"],
            adopt_existing=RESOLVED["adopt_existing"],
        ),
    message:
        "cache_latents: encode new and changed images with the VAE (shard {wildcards.shard} of {params.num_shards})"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage cache_latents --log {log:q} -- \
            python "$SCRIPTS"/qwen_image_cache_latents.py \
            --dataset_config {params.dataset_config:q} \
            --vae {params.vae:q} \
            --manifest {output.manifest:q} \
            --rejects {output.rejects:q} \
            --shard {wildcards.shard} \
            --num_shards {params.num_shards} \
            --on_bad_item {params.on_bad_item} \
            {params.switches} \
            --device {resources.device} \
            --batch_size {resources.batch_size} \
            --num_workers {resources.num_workers}
        """


rule cache_text_encoder_outputs:
    input:
        captions=lambda wildcards: watched(caption_files(wildcards)),
        text_encoder=lambda wildcards: watched(text_encoder_files()),
    output:
        manifest=transient(f"results/manifests/{DATASET}/shards/text_encoder_outputs.{SHARD}.tsv", KEEP_TEXTS),
        rejects=transient(f"results/manifests/{DATASET}/shards/text_encoder_outputs.{SHARD}.rejects.tsv", KEEP_TEXTS),
    log:
        f"results/logs/cache_text_encoder_outputs/{DATASET}/{SHARD}.log",
    benchmark:
        f"results/benchmarks/cache_text_encoder_outputs/{DATASET}/{SHARD}.tsv"
    conda:
        "../environment.yml"
    threads: 8
    resources:
        gpu=uses_gpu(RESOLVED["caching_teo_device"]),
        local_gpu=uses_gpu(RESOLVED["caching_teo_device"]),
        device=RESOLVED["caching_teo_device"] or "auto",
        batch_size=RESOLVED["caching_teo_batch_size"],
        num_workers=RESOLVED["caching_teo_num_workers"],
    params:
        dataset_config=lambda wildcards: RESOLVED["dataset_config"],
        text_encoder=lambda wildcards: RESOLVED["caching_teo_text_encoder"],
        tokenizer=(["--tokenizer", RESOLVED["tokenizer"]] if RESOLVED["tokenizer"] else []),
        version=TEXT_ENCODER_VERSION,
        settings=lambda wildcards: dataset_settings(*TEXT_SETTINGS),
        members=lambda wildcards: members(wildcards, "caption"),
        stamp=lambda wildcards: stamp([*caption_files(wildcards), *text_encoder_files()]),
        num_shards=SHARDS,
        on_bad_item=RESOLVED["on_bad_item"],
        switches=switches(
            fp8_vl=RESOLVED["caching_teo_fp8_vl"],
            skip_existing=RESOLVED["caching_teo_skip_existing"],
            keep_cache=KEEP_TEXTS,
            deterministic=RESOLVED["deterministic"],
            adopt_existing=RESOLVED["adopt_existing"],
        ),
    message:
        "cache_text_encoder_outputs: encode new and changed captions with the text encoder (shard {wildcards.shard} of {params.num_shards})"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage cache_text_encoder_outputs --log {log:q} -- \
            python "$SCRIPTS"/qwen_image_cache_text_encoder_outputs.py \
            --dataset_config {params.dataset_config:q} \
            --text_encoder {params.text_encoder:q} \
            {params.tokenizer:q} \
            --manifest {output.manifest:q} \
            --rejects {output.rejects:q} \
            --shard {wildcards.shard} \
            --num_shards {params.num_shards} \
            --on_bad_item {params.on_bad_item} \
            {params.switches} \
            --device {resources.device} \
            --batch_size {resources.batch_size} \
            --num_workers {resources.num_workers}
        """


checkpoint merge_latents:
    input:
        manifests=expand(f"results/manifests/{DATASET}/shards/latents.{SHARD}.tsv", shard=range(1, SHARDS + 1)),
        rejects=expand(f"results/manifests/{DATASET}/shards/latents.{SHARD}.rejects.tsv", shard=range(1, SHARDS + 1)),
    output:
        manifest=transient(LATENTS, KEEP_LATENTS),
        digest=transient(f"results/manifests/{DATASET}/latents.sha256", KEEP_LATENTS),
        rejects=f"results/manifests/{DATASET}/latents.rejects.tsv",
    log:
        f"results/logs/merge_latents/{DATASET}.log",
    conda:
        "../environment.yml"
    params:
        dataset_config=lambda wildcards: RESOLVED["dataset_config"],
        num_shards=SHARDS,
        switches=switches(keep_cache=KEEP_LATENTS),
    message:
        "merge_latents: put the shards' manifests together"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage merge_latents --log {log:q} -- \
            python "$SCRIPTS"/merge_manifests.py \
            --dataset_config {params.dataset_config:q} \
            --manifest {output.manifest:q} \
            {params.switches} \
            --num_shards {params.num_shards}
        """


checkpoint merge_text_encoder_outputs:
    input:
        manifests=expand(
            f"results/manifests/{DATASET}/shards/text_encoder_outputs.{SHARD}.tsv", shard=range(1, SHARDS + 1)
        ),
        rejects=expand(
            f"results/manifests/{DATASET}/shards/text_encoder_outputs.{SHARD}.rejects.tsv", shard=range(1, SHARDS + 1)
        ),
    output:
        manifest=transient(TEXTS, KEEP_TEXTS),
        digest=transient(f"results/manifests/{DATASET}/text_encoder_outputs.sha256", KEEP_TEXTS),
        rejects=f"results/manifests/{DATASET}/text_encoder_outputs.rejects.tsv",
    log:
        f"results/logs/merge_text_encoder_outputs/{DATASET}.log",
    conda:
        "../environment.yml"
    params:
        dataset_config=lambda wildcards: RESOLVED["dataset_config"],
        num_shards=SHARDS,
        switches=switches(keep_cache=KEEP_TEXTS),
    message:
        "merge_text_encoder_outputs: put the shards' manifests together"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage merge_text_encoder_outputs --log {log:q} -- \
            python "$SCRIPTS"/merge_manifests.py \
            --dataset_config {params.dataset_config:q} \
            --manifest {output.manifest:q} \
            {params.switches} \
            --num_shards {params.num_shards}
        """
