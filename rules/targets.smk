"""What each target of the Snakefile makes. Needs common.smk and inputs.smk."""


def final_targets():
    """What `snakemake` makes when no target is named."""
    results = [path.replace("{run}", run) for run in RUNS for path in (*lora_outputs(), TRAINED)]
    return [*first_targets(), *results, *([CLEARED] if transient_manifests() else [])]


def cache_targets():
    """What `snakemake cache_only` makes: everything that training needs of the caches."""
    caches = [path for run in RUNS for path in (latents_of(run), texts_of(run), *trained_prompts(run))]
    return [*first_targets(), *dict.fromkeys(caches)]


def sample_targets():
    """What `snakemake samples` makes."""
    if not sheets():
        raise WorkflowError("samples: no prompts; set sample_prompts (config/sample_prompts.txt is an example)")
    return [*first_targets(), *sheets()]


def sheets():
    """The contact sheets of all runs that have sample prompts."""
    return [SHEET.replace("{run}", run) for run, config in RUNS.items() if prompt_files(config)]


def compare_targets():
    """What `snakemake compare` makes: the trainings, and their comparison."""
    return [*final_targets(), "results/compare/report.html"]


def first_targets():
    """What every target wants beside its own files."""
    return [*(DEMO_FILES if USES_DEMO else []), f"results/check/{DATASET}.txt"]
