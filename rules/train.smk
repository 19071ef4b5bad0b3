"""Training, once both caches exist.

Needs the manifests, the DiT and the configuration's training arguments.
For each run it makes results/train/{RUN}/config.toml (training arguments only), resolved.yaml beside it, and the LoRA
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
        config=lambda wildcards: json.dumps(CONFIGS[run_name(wildcards)], sort_keys=True),
        latents=lambda wildcards: latents_of(run_name(wildcards)),
        texts=lambda wildcards: texts_of(run_name(wildcards)),
        prompts=lambda wildcards: [
            word for path in trained_prompts(run_name(wildcards)) for word in ("--prompts_manifest", path)
        ],
    message:
        f"train_config: write the trainer's TOML of {shown(RUN)}"
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
        toml=lambda wildcards: train_config_of(wildcards),
        latents_digest=lambda wildcards: latents_digest(wildcards),
        texts_digest=lambda wildcards: texts_digest(wildcards),
        # their content is asked for through the digests; a rewritten manifest that says the same trains nothing
        latents=ancient(lambda wildcards: latents_of(run_name(wildcards))),
        texts=ancient(lambda wildcards: texts_of(run_name(wildcards))),
        prompts=ancient(lambda wildcards: trained_prompts(run_name(wildcards))),
        dit=lambda wildcards: watched(dit_files(run_of(wildcards))),
        adapters=lambda wildcards: watched(adapter_files(run_of(wildcards))),
    output:
        # kept until a new one is complete, and put back when training fails
        *map(update, lora_outputs()),
        digest=TRAINED,
    log:
        train=f"results/logs/train/{RUN}.log",
        check=f"results/logs/check_lora/{RUN}.log",
    benchmark:
        f"results/benchmarks/train/{RUN}.tsv"
    conda:
        "../environment.yml"
    threads: 8
    resources:
        nodes=lambda wildcards: run_of(wildcards)["num_machines"],
        # SLURM counts `gpu` over all nodes of a job, `gres` on each; None asks for nothing
        gpu=lambda wildcards: run_of(wildcards)["num_processes"] if run_of(wildcards)["num_machines"] == 1 else None,
        gres=lambda wildcards: (
            f"gpu:{processes_on_each(run_of(wildcards))}" if run_of(wildcards)["num_machines"] > 1 else None
        ),
        # Snakemake takes it for no more than there are on this machine, or than it was told of
        local_gpu=lambda wildcards: processes_on_each(run_of(wildcards)),
        processes=lambda wildcards: processes_on_each(run_of(wildcards)),
        gpu_ids=lambda wildcards: gpu_ids(run_of(wildcards)),
        port=lambda wildcards: run_of(wildcards)["main_process_port"] or 0,  # 0: a free one
        # 0: an even share of the job's threads
        cpu_threads=lambda wildcards: run_of(wildcards)["num_cpu_threads_per_process"] or 0,
    params:
        loras=lambda wildcards: [
            f"{option}={path}" for option, path in zip(("--lora", "--diffusers"), loras(run_name(wildcards)))
        ],
        checkpoint=lambda wildcards: run_of(wildcards)["dit"],
        launch=lambda wildcards: launch_arguments(run_of(wildcards)),
        settings=lambda wildcards: dataset_settings(
            run_of(wildcards)["dataset_config"], "batch_size", "num_repeats", "loss_weight"
        ),
        stamp=lambda wildcards: stamp([*dit_files(run_of(wildcards)), *adapter_files(run_of(wildcards))]),
    message:
        f"train: train the LoRA {shown(RUN)}"
    shell:
        r"""
        # SLURM tells every process of a job that it should end. What waits for the training must not end before it
        trap '' TERM USR1
        cpu_threads={resources.cpu_threads}
        if ((cpu_threads == 0)); then
            cpu_threads=$((({threads} + {resources.processes} - 1) / {resources.processes}))
        fi
        python "$SCRIPTS"/run_stage.py --stage train --log {log.train:q} \
            --gpus {resources.processes} --gpu_ids={resources.gpu_ids:q} -- \
            python "$SCRIPTS"/launch_training.py {params.launch:q} \
            --gpu_ids all \
            --main_process_port {resources.port} \
            --num_cpu_threads_per_process "$cpu_threads" \
            -- "$SCRIPTS"/qwen_image_train_network.py --config_file {input.toml:q}
        python "$SCRIPTS"/run_stage.py --stage check_lora --log {log.check:q} -- \
            python "$SCRIPTS"/check_lora.py {params.loras:q} \
            --dit={params.checkpoint:q} \
            --digest {output.digest:q}
        """


rule clear_cache:
    input:
        loras=[TRAINED.replace("{run}", run) for run in RUNS],
        manifests=sum(transient_manifests().values(), []),
    output:
        table=CLEARED,
    log:
        "results/logs/clear_cache.log",
    conda:
        "../environment.yml"
    params:
        manifests=lambda wildcards: [
            word
            for file, manifests in transient_manifests().items()
            for word in (f"--dataset_config={file}", "--manifests", *manifests)
        ],
    message:
        "clear_cache: remove the cache files that training no longer needs"
    shell:
        r"""
        python "$SCRIPTS"/run_stage.py --stage clear_cache --log {log:q} -- \
            python "$SCRIPTS"/clear_cache.py \
            {params.manifests:q} \
            --table {output.table:q}
        """
