"""What a run says when it ends: where the LoRA is and what to do next, or which stage failed and why."""


onsuccess:
    print(
        f"\nThe LoRA is {LORA}\n"
        f"  loss curve   {LORA.removesuffix('.safetensors')}.loss.csv\n"
        f"  settings     results/train/{RUN}/resolved.yaml\n"
        "  next         load it in ComfyUI or diffusers; to train on your own images, copy config/config.example.yaml,\n"
        "               fill it in, and run: snakemake --cores all --configfile my.yaml"
    )


onerror:
    print(failures(), file=sys.stderr)
