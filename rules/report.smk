"""What the workflow says when it ends: where the LoRAs are and what to do next, or which stage failed and why."""


def made_now(path):
    """Whether this call of Snakemake has made the file."""
    return os.path.exists(path) and os.stat(path).st_mtime >= STARTED


def failures():
    """What the stages that failed in this run left as explanation."""
    reports = [path for path in Path("results/logs").rglob("*.failed") if made_now(path)]
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(reports))


onsuccess:
    new = [run for run in RUNS if os.path.exists(loras(run)[0]) and made_now(TRAINED.replace("{run}", run))]
    for run in new:
        lora = loras(run)[0]
        print(
            f"\nThe LoRA is {lora}\n"
            f"  loss curve   {lora.removesuffix('.safetensors')}.loss.csv\n"
            f"  settings     results/train/{run}/resolved.yaml"
        )
    if new and USES_DEMO:
        print(
            "  next         load it in ComfyUI or diffusers; to train on your own images, copy config/config.example.yaml,\n"
            "               fill it in, and run: .venv/bin/snakemake --cores all --configfile my.yaml"
        )


onerror:
    print(failures(), file=sys.stderr)
    runs = list(RUNS)
    # the target itself needs all of them
    if "compare" in workflow.dag_settings.targets and any(
        os.path.exists(TRAINED.replace("{run}", run)) for run in runs
    ):
        shell('python "$SCRIPTS"/compare_runs.py {runs:q} --output_dir results/compare/so_far || true')
