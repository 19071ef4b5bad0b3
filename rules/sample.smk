"""Sample pictures: the prompts' cache, and pictures of every checkpoint that a training saved.

Needs the file of sample_prompts, the text encoder, the VAE, the DiT and a finished training.
Makes results/manifests/{DATASET}/prompts/{RUN}.tsv with the cache files in the folder of that name: the prompts, and
the empty caption where captions are dropped. Training waits for it only where it uses one of them, and no text encoder
is loaded then. On `snakemake samples` it makes results/samples/{RUN}/sheet.png, checkpoints by prompts, with the
pictures in full size beside it; the pictures of the training itself lie in {output_dir}/sample.
"""


rule cache_prompts:
    input:
        prompts=lambda wildcards: watched(prompt_files()),
        text_encoder=lambda wildcards: watched(text_encoder_files()),
    output:
        manifest=PROMPTS,
    log:
        f"results/logs/cache_prompts/{RUN}.log",
    benchmark:
        f"results/benchmarks/cache_prompts/{RUN}.tsv"
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
        prompts=lambda wildcards: [word for path in prompt_files() for word in ("--sample_prompts", path)],
        text_encoder=lambda wildcards: RESOLVED["caching_teo_text_encoder"],
        tokenizer=(["--tokenizer", RESOLVED["tokenizer"]] if RESOLVED["tokenizer"] else []),
        version=TEXT_ENCODER_VERSION,
        stamp=lambda wildcards: stamp([*prompt_files(), *text_encoder_files()]),
        switches=switches(
            empty_caption=DROPS_CAPTIONS,
            fp8_vl=RESOLVED["caching_teo_fp8_vl"],
            skip_existing=RESOLVED["caching_teo_skip_existing"],
            keep_cache=KEEP_TEXTS,
            deterministic=RESOLVED["deterministic"],
        ),
    message:
        "cache_prompts: encode new and changed prompts with the text encoder"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage cache_prompts --log {log:q} -- \
            python "$SCRIPTS"/qwen_image_cache_prompts.py \
            {params.prompts:q} \
            --text_encoder {params.text_encoder:q} \
            {params.tokenizer:q} \
            --manifest {output.manifest:q} \
            {params.switches} \
            --device {resources.device} \
            --batch_size {resources.batch_size} \
            --num_workers {resources.num_workers}
        """


rule generate_samples:
    input:
        lora=f"results/train/{RUN}/lora.sha256",
        manifest=PROMPTS,
        prompts=lambda wildcards: watched(prompt_files()),
        dit=lambda wildcards: watched(dit_files()),
        vae=lambda wildcards: watched(vae_files()),
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
        lora=lambda wildcards: LORA,
        checkpoint=lambda wildcards: RESOLVED["dit"],
        vae=lambda wildcards: RESOLVED["vae"],
        prompts=lambda wildcards: prompt_files(),
        folder=lambda wildcards, output: str(Path(output.sheet).parent),
        precision=RESOLVED["mixed_precision"],
        training=lambda wildcards: options("seed", "base_weights", "base_weights_multiplier"),
        stamp=lambda wildcards: stamp([*prompt_files(), *dit_files(), *vae_files()]),
    message:
        "generate_samples: make pictures of every saved checkpoint"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage generate_samples --log {log:q} -- \
            python "$SCRIPTS"/qwen_image_generate_samples.py \
            --checkpoints_of {params.lora:q} \
            --dit {params.checkpoint:q} \
            --vae {params.vae:q} \
            --sample_prompts {params.prompts:q} \
            --prompts_manifest {input.manifest:q} \
            --output_dir {params.folder:q} \
            --sheet {output.sheet:q} \
            --mixed_precision {params.precision} \
            {params.training:q} \
            --device {resources.device}
        """
