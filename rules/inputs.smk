"""What the rules are given: the files that the configuration names, and what else of it counts, as short parameters.

Contract: a run's configuration, or a job's wildcards -> lists of files, and values that change exactly when the rule has to
run again. Whatever looks at files waits for the demo where the demo makes them. Needs common.smk.
"""

import hashlib

from qwen_image.cache.shards import split_listing
from qwen_image.check import check_times, is_still_to_come
from qwen_image.models.checkpoint import checkpoint_files
from qwen_image.models.tokenizer import tokenizer_files
from qwen_image.runs.folders import makers_before, subfolder


# ---- files -----------------------------------------------------------------------------------------------------------
def after_demo():
    """Put off whatever looks at files until the demo, where it is asked for, is made. Returns the demo's files."""
    return list(checkpoints.demo.get().output) if USES_DEMO else []


def demo_before_merge(one):
    """The demo's files where `cache_subfolder` looks at them; their content counts in the shards' own rules."""
    return [] if has_own_dataset(one) else after_demo()


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


@functools.cache
def settings_by_file():
    """The settings of every dataset, by dataset file."""
    return {file: [settings for settings, _ in datasets(file)] for file in DATASET_FILES}


def has_own_dataset(one):
    """Whether a set is of the configuration's own datasets, which make way for no others."""
    return one.dataset_config == OWN.get("dataset_config")


def cache_subfolder(one, settings):
    """The option for a set whose files would take the place of others in the datasets' own cache directories."""
    known = {one.dataset_config: []} if has_own_dataset(one) else settings_by_file()
    folder = subfolder(one, known, OWN, settings)
    return ["--cache_subfolder", folder] if folder else []


@functools.cache
def latents_before():
    """The sets of latents that each set waits for, by name; a single one waits for nothing and looks at no file."""
    sets = LATENT_SETS_BY_NAME
    return makers_before(sets.values(), settings_by_file(), OWN, LATENT_SETTINGS) if len(sets) > 1 else {}


@functools.cache
def texts_before():
    """The same of captions."""
    sets = TEXT_SETS_BY_NAME
    return makers_before(sets.values(), settings_by_file(), OWN, TEXT_SETTINGS) if len(sets) > 1 else {}


# ---- parameters ------------------------------------------------------------------------------------------------------
def watched(paths):
    """The paths that Snakemake can watch as inputs: all but those that it would take for a wildcard."""
    return sorted({str(path) for path in paths if not contains_wildcard(str(path))})


def stamp(paths):
    """A short text that changes with the size of each file, for one that an older one has replaced, and with the times of
    those that Snakemake cannot watch as inputs."""
    stats = [(str(path), os.stat(path)) for path in paths]
    if any(is_still_to_come(stat.st_mtime) for _, stat in stats):
        or_stop(lambda: check_times(checked().datasets))
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
    # a moved row is no other parameter of clear_cache, which would have to make the caches again
    return {file: sorted(set(several)) for file, several in sorted(manifests.items()) if several}
