"""What a run says when it ends: where the LoRA is and what to do next, or which stage failed and why."""


onsuccess:
    trained = Path(f"results/train/{RUN}/lora.sha256")
    if os.path.exists(LORA) and trained.exists() and trained.stat().st_mtime >= STARTED:
        print(
            f"\nThe LoRA is {LORA}\n"
            f"  loss curve   {LORA.removesuffix('.safetensors')}.loss.csv\n"
            f"  settings     results/train/{RUN}/resolved.yaml\n"
            "  next         load it in ComfyUI or diffusers; to train on your own images, copy config/config.example.yaml,\n"
            "               fill it in, and run: .venv/bin/snakemake --cores all --configfile my.yaml"
        )


onerror:
    print(failures(), file=sys.stderr)
