"""The two caching stages. Everything that is trained on passes through them; there is no switch to go without.

Needs the dataset's images, captions, the VAE and the text encoder.
Makes results/manifests/{DATASET}/latents.tsv and text_encoder_outputs.tsv, one for each dataset and model that the runs
use (all runs of the same ones share it), each with the table of rejects and a digest
of the manifest beside it; the cache files themselves lie in the datasets' cache directories and are their own memory.
Of an item with several captions the texts' manifest has a row, and the cache a file, a caption.
Each stage is `caching_shards` jobs. An item's shard is a hash of its key, so that a new or changed one concerns one job;
the shards' own manifests lie in shards/, and a cheap step merges them into one in the same order for any number.

Whatever the user wrote reaches a rule through a function: Snakemake takes no braces in it for wildcards then.
In a command it stands behind `--option=`: a path may begin with a dash.
`gpu` is what a cluster is asked for, `local_gpu` keeps stages on one machine from sharing a GPU (profiles/default).
Sets that share files, of datasets that differ in repeats alone, are made one after the other (`before`), and only the first
encodes. What says that it is made is its table of rejects, which stays where manifests do not.
Device, batch size and workers are resources, not parameters: they have no bearing on what is made, so changing them runs
nothing again, and a profile may set them for a machine.
The merge steps are checkpoints so that training is looked at again once the manifests are there: a stage that ran and
found nothing to encode leaves the manifest's content, and with it the LoRA, as it was.
"""


localrules:
    merge_latents,
    merge_text_encoder_outputs,


rule cache_latents:
    input:
        images=lambda wildcards: watched(image_files(latent_set(wildcards).dataset_config, wildcards)),
        vae=lambda wildcards: watched(vae_files(latent_set(wildcards).config)),
        before=ancient(
            lambda wildcards: [
                f"results/manifests/{name}/latents.rejects.tsv"
                for name in latents_before().get(latent_set(wildcards).name, [])
            ]
        ),
    output:
        manifest=transient(f"results/manifests/{LATENT_SET}/shards/latents.{SHARD}.tsv", KEEP_LATENTS),
        rejects=transient(f"results/manifests/{LATENT_SET}/shards/latents.{SHARD}.rejects.tsv", KEEP_LATENTS),
    log:
        f"results/logs/cache_latents/{LATENT_SET}/{SHARD}.log",
    benchmark:
        f"results/benchmarks/cache_latents/{LATENT_SET}/{SHARD}.tsv"
    conda:
        "../environment.yml"
    threads: 8
    resources:
        gpu=uses_gpu(SHARED["caching_latent_device"]),
        local_gpu=uses_gpu(SHARED["caching_latent_device"]),
        device=SHARED["caching_latent_device"] or "auto",
        batch_size=SHARED["caching_latent_batch_size"],
        num_workers=SHARED["caching_latent_num_workers"],
    params:
        dataset_config=lambda wildcards: latent_set(wildcards).dataset_config,
        vae=lambda wildcards: latent_set(wildcards).config["vae"],
        version=f"{PREPROCESSING_VERSION}.{LATENT_ENCODER_VERSION}",
        subfolder=lambda wildcards: cache_subfolder(latent_set(wildcards), LATENT_SETTINGS),
        settings=lambda wildcards: dataset_settings(latent_set(wildcards).dataset_config, *LATENT_SETTINGS),
        members=lambda wildcards: members(latent_set(wildcards).dataset_config, wildcards),
        stamp=lambda wildcards: stamp(
            [
                *image_files(latent_set(wildcards).dataset_config, wildcards),
                *vae_files(latent_set(wildcards).config),
            ]
        ),
        num_shards=SHARDS,
        on_bad_item=SHARED["on_bad_item"],
        switches=switches(
            skip_existing=SHARED["caching_latent_skip_existing"],
            keep_cache=KEEP_LATENTS,
            deterministic=SHARED["deterministic"],
            adopt_existing=SHARED["adopt_existing"],
        ),
    message:
        f"cache_latents: encode new and changed images of {shown(LATENT_SET)} with the VAE (shard {shown(SHARD)})"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage cache_latents --log {log:q} \
            --gpus {resources.local_gpu} --gpu_ids {resources.device} -- \
            python "$SCRIPTS"/qwen_image_cache_latents.py \
            --dataset_config={params.dataset_config:q} \
            --vae={params.vae:q} \
            {params.subfolder:q} \
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
        captions=lambda wildcards: watched(caption_files(text_set(wildcards).dataset_config, wildcards)),
        text_encoder=lambda wildcards: watched(text_encoder_files(text_set(wildcards).config)),
        before=ancient(
            lambda wildcards: [
                f"results/manifests/{name}/text_encoder_outputs.rejects.tsv"
                for name in texts_before().get(text_set(wildcards).name, [])
            ]
        ),
    output:
        manifest=transient(f"results/manifests/{TEXT_SET}/shards/text_encoder_outputs.{SHARD}.tsv", KEEP_TEXTS),
        rejects=transient(f"results/manifests/{TEXT_SET}/shards/text_encoder_outputs.{SHARD}.rejects.tsv", KEEP_TEXTS),
    log:
        f"results/logs/cache_text_encoder_outputs/{TEXT_SET}/{SHARD}.log",
    benchmark:
        f"results/benchmarks/cache_text_encoder_outputs/{TEXT_SET}/{SHARD}.tsv"
    conda:
        "../environment.yml"
    threads: 8
    resources:
        gpu=uses_gpu(SHARED["caching_teo_device"]),
        local_gpu=uses_gpu(SHARED["caching_teo_device"]),
        device=SHARED["caching_teo_device"] or "auto",
        batch_size=SHARED["caching_teo_batch_size"],
        num_workers=SHARED["caching_teo_num_workers"],
    params:
        dataset_config=lambda wildcards: text_set(wildcards).dataset_config,
        text_encoder=lambda wildcards: text_set(wildcards).config["caching_teo_text_encoder"],
        tokenizer=lambda wildcards: tokenizer(text_set(wildcards).config),
        version=TEXT_ENCODER_VERSION,
        subfolder=lambda wildcards: cache_subfolder(text_set(wildcards), TEXT_SETTINGS),
        settings=lambda wildcards: dataset_settings(text_set(wildcards).dataset_config, *TEXT_SETTINGS),
        members=lambda wildcards: members(text_set(wildcards).dataset_config, wildcards, "caption"),
        stamp=lambda wildcards: stamp(
            [
                *caption_files(text_set(wildcards).dataset_config, wildcards),
                *text_encoder_files(text_set(wildcards).config),
            ]
        ),
        num_shards=SHARDS,
        on_bad_item=SHARED["on_bad_item"],
        switches=lambda wildcards: switches(
            fp8_vl=text_set(wildcards).config["caching_teo_fp8_vl"],
            skip_existing=SHARED["caching_teo_skip_existing"],
            keep_cache=KEEP_TEXTS,
            deterministic=SHARED["deterministic"],
            adopt_existing=SHARED["adopt_existing"],
        ),
    message:
        f"cache_text_encoder_outputs: encode new and changed captions of {shown(TEXT_SET)} (shard {shown(SHARD)})"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage cache_text_encoder_outputs --log {log:q} \
            --gpus {resources.local_gpu} --gpu_ids {resources.device} -- \
            python "$SCRIPTS"/qwen_image_cache_text_encoder_outputs.py \
            --dataset_config={params.dataset_config:q} \
            --text_encoder={params.text_encoder:q} \
            {params.tokenizer:q} \
            {params.subfolder:q} \
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
        manifests=expand(
            f"results/manifests/{LATENT_SET}/shards/latents.{SHARD}.tsv",
            shard=range(1, SHARDS + 1),
            allow_missing=True,
        ),
        rejects=expand(
            f"results/manifests/{LATENT_SET}/shards/latents.{SHARD}.rejects.tsv",
            shard=range(1, SHARDS + 1),
            allow_missing=True,
        ),
        demo=ancient(lambda wildcards: demo_before_merge(latent_set(wildcards))),
    output:
        manifest=transient(LATENTS, KEEP_LATENTS),
        digest=transient(f"results/manifests/{LATENT_SET}/latents.sha256", KEEP_LATENTS),
        rejects=f"results/manifests/{LATENT_SET}/latents.rejects.tsv",
    log:
        f"results/logs/merge_latents/{LATENT_SET}.log",
    conda:
        "../environment.yml"
    params:
        dataset_config=lambda wildcards: latent_set(wildcards).dataset_config,
        subfolder=lambda wildcards: cache_subfolder(latent_set(wildcards), LATENT_SETTINGS),
        num_shards=SHARDS,
        switches=switches(keep_cache=KEEP_LATENTS),
    message:
        f"merge_latents: put the shards' manifests of {shown(LATENT_SET)} together"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage merge_latents --log {log:q} -- \
            python "$SCRIPTS"/merge_manifests.py \
            --dataset_config={params.dataset_config:q} \
            --manifest {output.manifest:q} \
            {params.subfolder:q} \
            {params.switches} \
            --num_shards {params.num_shards}
        """


checkpoint merge_text_encoder_outputs:
    input:
        manifests=expand(
            f"results/manifests/{TEXT_SET}/shards/text_encoder_outputs.{SHARD}.tsv",
            shard=range(1, SHARDS + 1),
            allow_missing=True,
        ),
        rejects=expand(
            f"results/manifests/{TEXT_SET}/shards/text_encoder_outputs.{SHARD}.rejects.tsv",
            shard=range(1, SHARDS + 1),
            allow_missing=True,
        ),
        demo=ancient(lambda wildcards: demo_before_merge(text_set(wildcards))),
    output:
        manifest=transient(TEXTS, KEEP_TEXTS),
        digest=transient(f"results/manifests/{TEXT_SET}/text_encoder_outputs.sha256", KEEP_TEXTS),
        rejects=f"results/manifests/{TEXT_SET}/text_encoder_outputs.rejects.tsv",
    log:
        f"results/logs/merge_text_encoder_outputs/{TEXT_SET}.log",
    conda:
        "../environment.yml"
    params:
        dataset_config=lambda wildcards: text_set(wildcards).dataset_config,
        subfolder=lambda wildcards: cache_subfolder(text_set(wildcards), TEXT_SETTINGS),
        num_shards=SHARDS,
        switches=switches(keep_cache=KEEP_TEXTS),
    message:
        f"merge_text_encoder_outputs: put the shards' manifests of {shown(TEXT_SET)} together"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage merge_text_encoder_outputs --log {log:q} -- \
            python "$SCRIPTS"/merge_manifests.py \
            --dataset_config={params.dataset_config:q} \
            --manifest {output.manifest:q} \
            {params.subfolder:q} \
            {params.switches} \
            --num_shards {params.num_shards}
        """
