"""What the rules share: the checked configuration, its runs, the paths made from it, and the lists of files it names.

Contract: `config` -> RUNS (every run's configuration by name, defaults filled in) and SHARED (what holds for all of them),
the patterns of paths, and the functions below. Where there are several runs, or several caches, their names are the wildcards
`run`, `latents`, `texts` and `prompts`; where there is one, its name is written out. All names are safe in any path.
Anything wrong with the configuration or with what it names stops here, all problems in one message.
"""

import functools
import hashlib
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
from qwen_image.cache.shards import split_listing
from qwen_image.check import check_all
from qwen_image.config import launch_arguments, resolve_config
from qwen_image.files import safe_name
from qwen_image.models.checkpoint import checkpoint_files
from qwen_image.models.tokenizer import tokenizer_files
from qwen_image.problems import InputError
from qwen_image.runs.caches import (
    LATENT_MODEL,
    LATENT_SETTINGS,
    TEXT_MODEL,
    TEXT_SETTINGS,
    cache_sets,
    dataset_files,
    drops_captions,
    prompt_sets,
    subfolder,
    uses_prompts,
)
from qwen_image.runs.table import GRID, LONGEST_NAME, TABLE, expand_runs, key_problems

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
        raise InputError(problems)


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
LATENT_SETS = cache_sets(RUNS, SHARED, LATENT_MODEL)
TEXT_SETS = cache_sets(RUNS, SHARED, TEXT_MODEL)
PROMPT_SETS = prompt_sets(RUNS, TEXT_SETS)
LATENT_SETS_BY_NAME = {one.name: one for one in LATENT_SETS.values()}
TEXT_SETS_BY_NAME = {one.name: one for one in TEXT_SETS.values()}
# any run that uses the set: all that do agree in what it is made from
PROMPT_CONFIGS = {name: RUNS[run] for run, name in PROMPT_SETS.items()}
DATASET_FILES = [
    path for path in dataset_files(RUNS, SHARED) if any(run["dataset_config"] == path for run in RUNS.values())
]
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
DATASET = safe_name(Path(SHARED["dataset_config"]).stem)
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


# ---- what the configuration names ------------------------------------------------------------------------------------
def after_demo():
    """Put off whatever looks at files until the demo, where it is asked for, is made. Returns the demo's files."""
    return list(checkpoints.demo.get().output) if USES_DEMO else []


def demo_before_merge():
    """The demo's files where `cache_subfolder` looks at them; their content counts in the shards' own rules."""
    return after_demo() if len(DATASET_FILES) > 1 else []


def datasets(file):
    """The datasets of a dataset file with their items."""
    after_demo()
    return checked().datasets[file]


@functools.cache
def split_datasets(file):
    """The datasets' listings by shard, from 0 on."""
    parts = [split_listing(listing, SHARDS) for _, listing in datasets(file)]
    return list(zip(*parts, strict=True))


def listings(file, wildcards):
    """The datasets' listings: of one shard where the rule has shards, else whole."""
    after_demo()
    if hasattr(wildcards, "shard"):
        return split_datasets(file)[int(wildcards.shard) - 1]
    return [listing for _, listing in datasets(file)]


def items(file, wildcards):
    """The usable items of a shard or, without one, of every dataset of a file."""
    return [item for listing in listings(file, wildcards) for item in listing.items]


def image_files(file, wildcards):
    """The items' pictures."""
    return [item.image_path for item in items(file, wildcards)]


def caption_files(file, wildcards):
    """The items' caption files. A caption that stands in a JSONL file is a parameter."""
    return [item.caption_path for item in items(file, wildcards) if item.caption_path]


def vae_files(config):
    """The VAE's files."""
    after_demo()
    return checkpoint_files(config["vae"], "vae")


def dit_files(config):
    """The DiT's files."""
    after_demo()
    return checkpoint_files(config["dit"], "dit")


def adapter_files(config):
    """The adapters that training starts from, or that are merged into the DiT before."""
    start = config.get("network_weights")
    return [*([start] if start else []), *(config.get("base_weights") or [])]


def text_encoder_files(config):
    """The text encoder's files and its tokenizer's."""
    after_demo()
    encoder = config["caching_teo_text_encoder"]
    return [*checkpoint_files(encoder, "text_encoder"), *tokenizer_files(encoder, config["tokenizer"])]


def prompt_files(config):
    """The file of sample prompts, where there is one."""
    path = config.get("sample_prompts", None)
    return [path] if path is not None else []


def cache_subfolder(one, settings):
    """The option for a set whose files would take the place of another's in the datasets' own cache directories."""
    # a single dataset file is in nobody's way
    several = len(DATASET_FILES) > 1
    files = {file: [listed for listed, _ in datasets(file)] if several else [] for file in DATASET_FILES}
    folder = subfolder(one, files, settings)
    return ["--cache_subfolder", folder] if folder else []


# ---- inputs and parameters -------------------------------------------------------------------------------------------
def watched(paths):
    """The paths that Snakemake can watch as inputs: all but those that it would take for a wildcard."""
    return sorted({str(path) for path in paths if not contains_wildcard(str(path))})


def stamp(paths):
    """A short text that changes with the size of each file, for one that an older one has replaced, and with the times of
    those that Snakemake cannot watch as inputs."""
    stats = [(str(path), os.stat(path)) for path in paths]
    sizes = [stat.st_size for _, stat in stats]
    return digest([sizes, sorted([path, stat.st_mtime_ns] for path, stat in stats if contains_wildcard(path))])


def digest(value):
    """A short text for a long value, as a rule's parameter."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def members(file, wildcards, *names):
    """A short text that changes when items are added, removed or renamed, or are left out for another reason. `names` are
    what else counts of an item."""
    rejects = [[one.dataset, one.key, one.reason] for listing in listings(file, wildcards) for one in listing.rejects]
    names = ("dataset", "key", *names)
    return digest([[getattr(item, name) for name in names] for item in items(file, wildcards)] + rejects)


def dataset_settings(file, *names):
    """The named settings of every dataset, as a rule's parameter: only a change of these runs the rule again."""
    return [[str(getattr(settings, name)) for name in names] for settings, _ in datasets(file)]


def uses_gpu(device):
    """GPUs to ask for; where the configuration leaves the choice open a GPU is asked for."""
    return 0 if device == "cpu" else 1


def processes_on_each(config):
    """The training's processes on each of its machines."""
    return config["num_processes"] // config["num_machines"]


def gpu_ids(config):
    """The GPUs that the training may use."""
    return "all" if config["gpu_ids"] is None else str(config["gpu_ids"])


def switches(**flags):
    """The command-line switches that are on."""
    return [f"--{name}" for name, on in flags.items() if on]


def tokenizer(config):
    """The command-line option of the tokenizer, where it is named."""
    return [f"--tokenizer={config['tokenizer']}"] if config["tokenizer"] else []


def options(config, *names):
    """The command-line options of training arguments that are set; a path that begins with a dash is no option."""
    values = {name: config.get(name, None) for name in names}
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items() if value is not None}
    return [word for name, words in lists.items() for word in (f"--{name}", *map(_word, words))]


def _word(value):
    return f"./{value}" if isinstance(value, str) and value.startswith("-") else str(value)


def made(rule, output, wildcards):
    """The output of a checkpoint; asking through it makes Snakemake decide again once the checkpoint has run."""
    return getattr(getattr(checkpoints, rule).get(**wildcards).output, output)


def train_config_of(wildcards):
    """The trainer's TOML of a run, looked at again after it was written."""
    return made("train_config", "toml", dict(wildcards.items()))


def latents_digest(wildcards):
    """The digest of a run's manifest, looked at again after it was merged; a transient one is not waited for."""
    run = run_name(wildcards)
    several = {"latents": LATENT_SETS[run].name} if len(LATENT_SETS_BY_NAME) > 1 else {}
    after_demo()
    return made("merge_latents", "digest", several) if KEEP_LATENTS else digest_beside(latents_of(run))


def texts_digest(wildcards):
    """The same of its captions."""
    run = run_name(wildcards)
    several = {"texts": TEXT_SETS[run].name} if len(TEXT_SETS_BY_NAME) > 1 else {}
    after_demo()
    return made("merge_text_encoder_outputs", "digest", several) if KEEP_TEXTS else digest_beside(texts_of(run))


def digest_beside(manifest):
    """Where the digest of a manifest lies."""
    return manifest.removesuffix(".tsv") + ".sha256"


def transient(path, keep):
    """A manifest that Snakemake removes after its last use, where the cache itself is not to be kept."""
    return path if keep else temp(path)


def transient_manifests():
    """The manifests whose cache files go once the trainings are done with them, by dataset file."""
    manifests = {}
    for run, config in RUNS.items():
        going = [*([] if KEEP_LATENTS else [latents_of(run)]), *([] if KEEP_TEXTS else [texts_of(run)])]
        manifests.setdefault(config["dataset_config"], []).extend(going)
    return {file: list(dict.fromkeys(several)) for file, several in manifests.items() if several}


def made_now(path):
    """Whether this call of Snakemake has made the file."""
    return os.path.exists(path) and os.stat(path).st_mtime >= STARTED


def failures():
    """What the stages that failed in this run left as explanation."""
    reports = [path for path in Path("results/logs").rglob("*.failed") if made_now(path)]
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(reports))


# ---- targets ---------------------------------------------------------------------------------------------------------
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
