"""Training, once both caches exist.

Needs the manifests, the DiT and the configuration's training arguments.
Makes results/train/{RUN}/config.toml (training arguments only), resolved.yaml beside it, and the LoRA
{output_dir}/{output_name}.safetensors with its hash in results/train/{RUN}/lora.sha256, written once the LoRA was loaded
back as its readers load it. A training that was stopped goes on: its states in {output_dir} are no outputs.
"""


localrules:
    train_config,
    clear_cache,


checkpoint train_config:
    output:
        # rewritten only when their content changes
        toml=update(f"results/train/{RUN}/config.toml"),
        resolved=update(f"results/train/{RUN}/resolved.yaml"),
    log:
        f"results/logs/train_config/{RUN}.log",
    conda:
        "../environment.yml"
    params:
        config=lambda wildcards: CONFIG_JSON,
        latents=LATENTS,
        texts=TEXTS,
        prompts=["--prompts_manifest", PROMPTS] if USES_PROMPTS else [],
    message:
        "train_config: write the trainer's TOML"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage train_config --log {log:q} -- \
            python "$SCRIPTS"/write_train_config.py \
            --config_json {params.config:q} \
            --latents_manifest {params.latents:q} \
            --text_encoder_outputs_manifest {params.texts:q} \
            {params.prompts:q} \
            --toml {output.toml:q} \
            --resolved {output.resolved:q}
        """


rule train:
    input:
        toml=lambda wildcards: maker("train_config", "toml"),
        latents_digest=lambda wildcards: digest_of("merge_latents", LATENTS, KEEP_LATENTS),
        texts_digest=lambda wildcards: digest_of("merge_text_encoder_outputs", TEXTS, KEEP_TEXTS),
        # their content is asked for through the digests; a rewritten manifest that says the same trains nothing
        latents=ancient(LATENTS),
        texts=ancient(TEXTS),
        prompts=[ancient(PROMPTS)] if USES_PROMPTS else [],
        dit=lambda wildcards: watched(dit_files()),
        adapters=watched(adapter_files()),
    output:
        # kept until a new one is complete, and put back when training fails
        *map(update, watched(LORAS)),
        digest=f"results/train/{RUN}/lora.sha256",
    log:
        train=f"results/logs/train/{RUN}.log",
        check=f"results/logs/check_lora/{RUN}.log",
    benchmark:
        f"results/benchmarks/train/{RUN}.tsv"
    conda:
        "../environment.yml"
    threads: 8
    resources:
        gpu=RESOLVED["num_processes"],
        local_gpu=RESOLVED["num_processes"],
        processes=RESOLVED["num_processes"],
        gpu_ids="all" if RESOLVED["gpu_ids"] is None else str(RESOLVED["gpu_ids"]),
        port=RESOLVED["main_process_port"] or 0,  # 0: a free one
        cpu_threads=RESOLVED["num_cpu_threads_per_process"] or 0,  # 0: an even share of the job's threads
    params:
        loras=lambda wildcards: [f"{option}={path}" for option, path in zip(("--lora", "--diffusers"), LORAS)],
        checkpoint=lambda wildcards: RESOLVED["dit"],
        launch=launch_arguments(RESOLVED),
        settings=lambda wildcards: dataset_settings("batch_size", "num_repeats", "loss_weight"),
        stamp=lambda wildcards: stamp([*dit_files(), *adapter_files()]),
    message:
        "train: train the LoRA"
    shell:
        r"""
        cpu_threads={resources.cpu_threads}
        if ((cpu_threads == 0)); then
            cpu_threads=$((({threads} + {resources.processes} - 1) / {resources.processes}))
        fi
        python "$SCRIPTS"/run_stage.py --stage train --log {log.train:q} -- \
            accelerate launch {params.launch:q} \
            --gpu_ids {resources.gpu_ids:q} \
            --main_process_port {resources.port} \
            --num_cpu_threads_per_process "$cpu_threads" \
            "$SCRIPTS"/qwen_image_train_network.py --config_file {input.toml:q}
        python "$SCRIPTS"/run_stage.py --stage check_lora --log {log.check:q} -- \
            python "$SCRIPTS"/check_lora.py {params.loras:q} \
            --dit {params.checkpoint:q} \
            --digest {output.digest:q}
        """


rule clear_cache:
    input:
        lora=f"results/train/{RUN}/lora.sha256",
        manifests=transient_manifests(),
    output:
        table=CLEARED,
    log:
        f"results/logs/clear_cache/{RUN}.log",
    conda:
        "../environment.yml"
    params:
        dataset_config=lambda wildcards: RESOLVED["dataset_config"],
    message:
        "clear_cache: remove the cache files that training no longer needs"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage clear_cache --log {log:q} -- \
            python "$SCRIPTS"/clear_cache.py \
            --dataset_config {params.dataset_config:q} \
            --table {output.table:q} \
            --manifests {input.manifests:q}
        """
