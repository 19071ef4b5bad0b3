"""Sample pictures: the prompts' cache, and pictures of every checkpoint that a training saved.

Needs the file of sample_prompts, the text encoder, the VAE, the DiT and a finished training.
Makes results/manifests/{DATASET}/prompts/{RUN}.tsv, one for all runs of the same prompts (runs/caches.py has their names),
with the cache files in the folder of that name: the prompts, and the empty caption where captions are dropped. Training waits for it only where it uses one of them, and no text encoder
is loaded then. On `snakemake samples` it makes results/samples/{RUN}/sheet.png, checkpoints by prompts, with the
pictures in full size beside it; the pictures of the training itself lie in {output_dir}/sample.
"""


rule cache_prompts:
    input:
        prompts=lambda wildcards: watched(prompt_files(prompts_of(wildcards))),
        text_encoder=lambda wildcards: watched(text_encoder_files(prompts_of(wildcards))),
    output:
        manifest=PROMPTS,
    log:
        f"results/logs/cache_prompts/{PROMPT_SET}.log",
    benchmark:
        f"results/benchmarks/cache_prompts/{PROMPT_SET}.tsv"
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
        prompts=lambda wildcards: [f"--sample_prompts={path}" for path in prompt_files(prompts_of(wildcards))],
        text_encoder=lambda wildcards: prompts_of(wildcards)["caching_teo_text_encoder"],
        tokenizer=lambda wildcards: tokenizer(prompts_of(wildcards)),
        version=TEXT_ENCODER_VERSION,
        stamp=lambda wildcards: stamp(
            [*prompt_files(prompts_of(wildcards)), *text_encoder_files(prompts_of(wildcards))]
        ),
        switches=lambda wildcards: switches(
            empty_caption=drops_captions(prompts_of(wildcards)),
            fp8_vl=prompts_of(wildcards)["caching_teo_fp8_vl"],
            skip_existing=SHARED["caching_teo_skip_existing"],
            keep_cache=KEEP_TEXTS,
            deterministic=SHARED["deterministic"],
        ),
    message:
        "cache_prompts: encode new and changed prompts with the text encoder"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage cache_prompts --log {log:q} \
            --gpus {resources.local_gpu} --gpu_ids {resources.device} -- \
            python "$SCRIPTS"/qwen_image_cache_prompts.py \
            {params.prompts:q} \
            --text_encoder={params.text_encoder:q} \
            {params.tokenizer:q} \
            --manifest {output.manifest:q} \
            {params.switches} \
            --device {resources.device} \
            --batch_size {resources.batch_size} \
            --num_workers {resources.num_workers}
        """


rule generate_samples:
    input:
        lora=TRAINED,
        manifest=lambda wildcards: prompt_manifests(run_name(wildcards)),
        prompts=lambda wildcards: watched(prompt_files(run_of(wildcards))),
        dit=lambda wildcards: watched(dit_files(run_of(wildcards))),
        vae=lambda wildcards: watched(vae_files(run_of(wildcards))),
    output:
        sheet=SHEET,
    log:
        f"results/logs/generate_samples/{RUN}.log",
    benchmark:
        f"results/benchmarks/generate_samples/{RUN}.tsv"
    conda:
        "../environment.yml"
    threads: 8
    resources:
        gpu=1,
        local_gpu=1,
        device="auto",
    params:
        lora=lambda wildcards: loras(run_name(wildcards))[0],
        checkpoint=lambda wildcards: run_of(wildcards)["dit"],
        vae=lambda wildcards: run_of(wildcards)["vae"],
        prompts=lambda wildcards: prompt_files(run_of(wildcards)),
        folder=lambda wildcards, output: str(Path(output.sheet).parent),
        precision=lambda wildcards: run_of(wildcards)["mixed_precision"],
        training=lambda wildcards: options(run_of(wildcards), "seed", "base_weights", "base_weights_multiplier"),
        stamp=lambda wildcards: stamp(
            [*prompt_files(run_of(wildcards)), *dit_files(run_of(wildcards)), *vae_files(run_of(wildcards))]
        ),
    message:
        f"generate_samples: make pictures of every checkpoint of {shown(RUN)}"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage generate_samples --log {log:q} \
            --gpus {resources.local_gpu} --gpu_ids {resources.device} -- \
            python "$SCRIPTS"/qwen_image_generate_samples.py \
            --checkpoints_of={params.lora:q} \
            --dit={params.checkpoint:q} \
            --vae={params.vae:q} \
            --sample_prompts={params.prompts:q} \
            --prompts_manifest {input.manifest:q} \
            --output_dir {params.folder:q} \
            --sheet {output.sheet:q} \
            --mixed_precision {params.precision} \
            {params.training:q} \
            --device {resources.device}
        """
