"""What the rules share: the checked configuration, its runs and caches, and the paths that are made from it.

Contract: `config` -> RUNS (every run's configuration by name, defaults filled in) and SHARED (what holds for all of them),
the patterns of paths, and what each wildcard stands for. Where there are several runs, or several caches, their names are the wildcards
`run`, `latents`, `texts` and `prompts`; where there is one, its name is written out. All names are safe in any path.
Anything wrong with the configuration or with what it names stops here, all problems in one message.
"""

import functools
import json
import os
import re
import sys
import time
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.io import contains_wildcard

# the library behind the programs; where rules find the programs; and this environment's commands first, however
# snakemake was started. They are no parameters: a workflow that was moved makes nothing again.
sys.path.insert(0, f"{workflow.basedir}/scripts")
os.environ.update(
    SCRIPTS=f"{workflow.basedir}/scripts",
    PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]),
)

from qwen_image.cache.fingerprint import LATENT_ENCODER_VERSION, PREPROCESSING_VERSION, TEXT_ENCODER_VERSION
from qwen_image.check import check_all
from qwen_image.config import launch_arguments, resolve_config
from qwen_image.dataset.listing import limit
from qwen_image.files import safe_name
from qwen_image.problems import InputError
from qwen_image.runs.caches import (
    LATENT_MODEL,
    TEXT_MODEL,
    cache_sets,
    dataset_files,
    drops_captions,
    home,
    own_values,
    prompt_sets,
    uses_prompts,
)
from qwen_image.runs.folders import LATENT_SETTINGS, TEXT_SETTINGS
from qwen_image.runs.keys import GRID, LONGEST_NAME, TABLE
from qwen_image.runs.table import expand_runs, key_problems

STARTED = time.time()
DEMO = "resources/demo"
DEMO_FILES = [
    f"{DEMO}/{name}"
    for name in ("dataset.toml", "dit.safetensors", "vae.safetensors", "text_encoder/model.safetensors")
]
CONFIG_NAME = ", ".join(map(str, workflow.configfiles)) or "config"


def or_stop(check):
    """Run a check; its problems become Snakemake's own error, so that nothing starts."""
    try:
        return check()
    except InputError as error:
        raise WorkflowError(str(error)) from None


def check_keys():
    """Raise for keys that are wrong in themselves."""
    if problems := key_problems(config, CONFIG_NAME):
        raise InputError(limit(problems))


# by name; the configuration of each as the user wrote it, without defaults
CONFIGS = {safe_name(run.name, LONGEST_NAME): run.config for run in or_stop(lambda: expand_runs(config, CONFIG_NAME))}
CONFIG_JSON = json.dumps(config, sort_keys=True)
USES_DEMO = any(
    str(one.get(key, "")).startswith(f"{DEMO}/")
    for one in CONFIGS.values()
    for key in ("dataset_config", "dit", "vae", "text_encoder")
)


@functools.cache
def checked():
    """The configuration's runs and datasets, after everything it names was checked."""
    tables = [path for name in ("check", "manifests", "train") for path in Path("results", name).rglob("*.*")]
    return or_stop(lambda: check_all(config, CONFIG_NAME, tables))


# a verification says itself what is wrong with the files, together with all else; targets are not known here otherwise
if "verify" in sys.argv:
    or_stop(check_keys)
elif not USES_DEMO or all(map(os.path.exists, DEMO_FILES)):
    checked()
else:
    or_stop(check_keys)

# ---- runs and caches -------------------------------------------------------------------------------------------------
RUNS = {name: resolve_config(one) for name, one in CONFIGS.items()}
# what the runs do not set, and where the configuration leaves that to them, as in the first
SHARED = resolve_config({**next(iter(CONFIGS.values())), **{k: v for k, v in config.items() if k not in (TABLE, GRID)}})
# what caches are named after: which rows there are renames none
OWN = own_values(config)
LATENT_SETS = cache_sets(RUNS, OWN, LATENT_MODEL)
TEXT_SETS = cache_sets(RUNS, OWN, TEXT_MODEL)
PROMPT_SETS = prompt_sets(RUNS, OWN, TEXT_SETS)
LATENT_SETS_BY_NAME = {one.name: one for one in LATENT_SETS.values()}
TEXT_SETS_BY_NAME = {one.name: one for one in TEXT_SETS.values()}
# any run that uses the set: all that do agree in what it is made from
PROMPT_CONFIGS = {name: RUNS[run] for run, name in PROMPT_SETS.items()}
DATASET_FILES = dataset_files(RUNS, OWN)
KEEP_LATENTS = SHARED["caching_latent_keep_cache"]
KEEP_TEXTS = SHARED["caching_teo_keep_cache"]
SHARDS = SHARED["caching_shards"]


def pattern(wildcard, names):
    """The wildcard where there are several names, else the only one."""
    names = sorted(set(names))
    return names[0] if len(names) == 1 else f"{{{wildcard}}}"


def shown(name):
    """A name, or its wildcard, as a rule's message shows it."""
    return name.replace("{", "{wildcards.")


# ---- patterns of paths -----------------------------------------------------------------------------------------------
DATASET = home(OWN)
RUN = pattern("run", RUNS)
LATENT_SET = pattern("latents", LATENT_SETS_BY_NAME)
TEXT_SET = pattern("texts", TEXT_SETS_BY_NAME)
PROMPT_SET = pattern("prompts", PROMPT_SETS.values() or ["none"])
SHARD = f"{{shard}}-of-{SHARDS}"  # as the tables of a shard are named
LATENTS = f"results/manifests/{LATENT_SET}/latents.tsv"
TEXTS = f"results/manifests/{TEXT_SET}/text_encoder_outputs.tsv"
PROMPTS = f"results/manifests/{DATASET}/prompts/{PROMPT_SET}.tsv"
TRAINED = f"results/train/{RUN}/lora.sha256"
SHEET = f"results/samples/{RUN}/sheet.png"
CLEARED = "results/train/cleared.tsv" if len(RUNS) > 1 else f"results/train/{RUN}/cleared.tsv"


wildcard_constraints:
    run="|".join(map(re.escape, RUNS)),
    latents="|".join(map(re.escape, LATENT_SETS_BY_NAME)),
    texts="|".join(map(re.escape, TEXT_SETS_BY_NAME)),
    prompts="|".join(map(re.escape, PROMPT_CONFIGS)) or "none",
    shard="|".join(map(str, range(1, SHARDS + 1))),


def run_of(wildcards):
    """The job's run: its configuration."""
    return RUNS[run_name(wildcards)]


def run_name(wildcards):
    """The name of the job's run."""
    return getattr(wildcards, "run", next(iter(RUNS)))


def latent_set(wildcards):
    """What the job caches the latents of."""
    return LATENT_SETS_BY_NAME[getattr(wildcards, "latents", next(iter(LATENT_SETS_BY_NAME)))]


def text_set(wildcards):
    """What the job caches the captions of."""
    return TEXT_SETS_BY_NAME[getattr(wildcards, "texts", next(iter(TEXT_SETS_BY_NAME)))]


def prompts_of(wildcards):
    """A configuration with the prompts that the job caches."""
    return PROMPT_CONFIGS[getattr(wildcards, "prompts", next(iter(PROMPT_CONFIGS)))]


def latents_of(run):
    """The manifest of latents that a run trains on."""
    return LATENTS.replace("{latents}", LATENT_SETS[run].name)


def texts_of(run):
    """The manifest of captions that a run trains on."""
    return TEXTS.replace("{texts}", TEXT_SETS[run].name)


def prompt_manifests(run):
    """The manifest of a run's prompts, where it has any."""
    return [PROMPTS.replace("{prompts}", PROMPT_SETS[run])] if run in PROMPT_SETS else []


def trained_prompts(run):
    """The manifest of prompts that the training itself reads, where it does."""
    return prompt_manifests(run) if uses_prompts(RUNS[run]) else []


def loras(run):
    """The LoRAs of a run: the field's file and, with save_format both, the same in diffusers' names beside it."""
    lora = os.path.join(RUNS[run]["output_dir"], f"{RUNS[run]['output_name']}.safetensors")
    both = RUNS[run].get("save_format") == "both"
    return [lora] + [lora.removesuffix(".safetensors") + ".diffusers.safetensors"] * both


def lora_outputs():
    """The LoRAs as outputs of a rule: those that every run has, where Snakemake can watch them."""
    if len(RUNS) == 1:
        return watched(loras(RUN))
    endings = [".safetensors"]
    if all(run.get("save_format") == "both" for run in RUNS.values()):
        endings.append(".diffusers.safetensors")
    folder = SHARED["output_dir"]
    return [os.path.join(folder, RUN + ending) for ending in endings if not contains_wildcard(folder)]
