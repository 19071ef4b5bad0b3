"""What the rules share: the checked configuration, the paths made from it, and the lists of files it names.

Contract: `config` -> RESOLVED (defaults filled in), DATASET and RUN (names safe in any path), LORA, and the functions
below. Anything wrong with the configuration or with what it names stops here, all problems in one message.
"""

import functools
import hashlib
import json
import os
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
from qwen_image.config import check_config, launch_arguments, resolve_config
from qwen_image.files import safe_name
from qwen_image.models.checkpoint import checkpoint_files
from qwen_image.models.tokenizer import tokenizer_files
from qwen_image.problems import InputError

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


def key_problems():
    """Raise for keys that are wrong in themselves."""
    if problems := check_config(config, CONFIG_NAME):
        raise InputError(problems)


def demo_paths():
    """The configuration's paths that the demo makes."""
    keys = ("dataset_config", "dit", "vae", "text_encoder")
    return [config[key] for key in keys if str(config.get(key, "")).startswith(f"{DEMO}/")]


@functools.cache
def checked_datasets():
    """The datasets with their items, after everything the configuration names was checked."""
    return or_stop(lambda: check_all(config, CONFIG_NAME))[1]


if not demo_paths() or all(map(os.path.exists, DEMO_FILES)):
    checked_datasets()
else:
    or_stop(key_problems)

RESOLVED = resolve_config(config)
CONFIG_JSON = json.dumps(config, sort_keys=True)
DATASET = safe_name(Path(RESOLVED["dataset_config"]).stem)
RUN = safe_name(RESOLVED["output_name"])
LORA = os.path.join(RESOLVED["output_dir"], f"{RESOLVED['output_name']}.safetensors")
# with save_format both, the same in diffusers' names beside it
LORAS = [LORA] + [LORA.removesuffix(".safetensors") + ".diffusers.safetensors"] * (
    RESOLVED.get("save_format") == "both"
)
KEEP_LATENTS = RESOLVED["caching_latent_keep_cache"]
KEEP_TEXTS = RESOLVED["caching_teo_keep_cache"]
CLEARED = f"results/train/{RUN}/cleared.tsv"
LATENTS = f"results/manifests/{DATASET}/latents.tsv"
TEXTS = f"results/manifests/{DATASET}/text_encoder_outputs.tsv"
PROMPTS = f"results/manifests/{DATASET}/prompts/{RUN}.tsv"
SHEET = f"results/samples/{RUN}/sheet.png"
DROPS_CAPTIONS = RESOLVED.get("caption_dropout_rate", 0) > 0
# whether training reads texts that belong to no picture
USES_PROMPTS = DROPS_CAPTIONS or any(
    RESOLVED.get(key, False) for key in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
)
SHARDS = RESOLVED["caching_shards"]
SHARD = f"{{shard}}-of-{SHARDS}"  # as the tables of a shard are named

# settings of a dataset that bear on what is encoded, and on where it goes
LATENT_SETTINGS = (
    "image_directory",
    "image_jsonl_file",
    "cache_directory",
    "resolution",
    "enable_bucket",
    "bucket_no_upscale",
    "alpha_background",
)
TEXT_SETTINGS = (
    "image_directory",
    "image_jsonl_file",
    "cache_directory",
    "caption_extension",
    "multiple_captions",
)


def after_demo():
    """Put off whatever looks at files until the demo, where it is asked for, is made. Returns the demo's files."""
    return list(checkpoints.demo.get().output) if demo_paths() else []


def datasets():
    """The datasets with their items."""
    after_demo()
    return checked_datasets()


@functools.cache
def split_datasets():
    """The datasets' listings by shard, from 0 on."""
    parts = [split_listing(listing, SHARDS) for _, listing in datasets()]
    return list(zip(*parts, strict=True))


def listings(wildcards):
    """The datasets' listings: of one shard where the rule has shards, else whole."""
    after_demo()
    if hasattr(wildcards, "shard"):
        return split_datasets()[int(wildcards.shard) - 1]
    return [listing for _, listing in datasets()]


def items(wildcards):
    """The usable items of a shard or, without one, of every dataset."""
    return [item for listing in listings(wildcards) for item in listing.items]


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


def members(wildcards, *names):
    """A short text that changes when items are added, removed or renamed, or are left out for another reason. `names` are
    what else counts of an item."""
    rejects = [[one.dataset, one.key, one.reason] for listing in listings(wildcards) for one in listing.rejects]
    names = ("dataset", "key", *names)
    return digest([[getattr(item, name) for name in names] for item in items(wildcards)] + rejects)


def vae_files():
    """The VAE's files."""
    after_demo()
    return checkpoint_files(RESOLVED["vae"], "vae")


def dit_files():
    """The DiT's files."""
    after_demo()
    return checkpoint_files(RESOLVED["dit"], "dit")


def adapter_files():
    """The adapters that training starts from, or that are merged into the DiT before."""
    start = RESOLVED.get("network_weights")
    return [*([start] if start else []), *(RESOLVED.get("base_weights") or [])]


def text_encoder_files():
    """The text encoder's files and its tokenizer's."""
    after_demo()
    encoder = RESOLVED["caching_teo_text_encoder"]
    return [
        *checkpoint_files(encoder, "text_encoder"),
        *tokenizer_files(encoder, RESOLVED["tokenizer"]),
    ]


def prompt_files():
    """The file of sample prompts, where there is one."""
    path = RESOLVED.get("sample_prompts", None)
    return [path] if path is not None else []


def image_files(wildcards):
    """The items' pictures."""
    return [item.image_path for item in items(wildcards)]


def caption_files(wildcards):
    """The items' caption files. A caption that stands in a JSONL file is a parameter."""
    return [item.caption_path for item in items(wildcards) if item.caption_path]


def dataset_settings(*names):
    """The named settings of every dataset, as a rule's parameter: only a change of these runs the rule again."""
    return [[str(getattr(settings, name)) for name in names] for settings, _ in datasets()]


def uses_gpu(device):
    """GPUs to ask for; where the configuration leaves the choice open a GPU is asked for."""
    return 0 if device == "cpu" else 1


def switches(**flags):
    """The command-line switches that are on."""
    return [f"--{name}" for name, on in flags.items() if on]


def options(*names):
    """The command-line options of training arguments that are set."""
    values = {name: RESOLVED.get(name, None) for name in names}
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items() if value is not None}
    return [str(word) for name, words in lists.items() for word in (f"--{name}", *words)]


def maker(rule, output):
    """The output of a checkpoint; asking through it makes Snakemake decide again once the checkpoint has run."""
    return getattr(getattr(checkpoints, rule).get().output, output)


def digest_of(rule, manifest, keep):
    """The digest of a manifest, looked at again after it was merged; a transient one is not waited for."""
    if datasets() and keep:
        return maker(rule, "digest")
    return str(Path(manifest).with_suffix(".sha256"))


def transient(path, keep):
    """A manifest that Snakemake removes after its last use, where the cache itself is not to be kept."""
    return path if keep else temp(path)


def failures():
    """What the stages that failed in this run left as explanation."""
    reports = [path for path in Path("results/logs").rglob("*.failed") if path.stat().st_mtime >= STARTED]
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(reports))


def final_targets():
    """What `snakemake` makes when no target is named."""
    cleared = [CLEARED] if transient_manifests() else []
    return [*first_targets(), *watched(LORAS), f"results/train/{RUN}/lora.sha256", *cleared]


def cache_targets():
    """What `snakemake cache_only` makes: everything that training needs of the caches."""
    return [*first_targets(), LATENTS, TEXTS, *([PROMPTS] if USES_PROMPTS else [])]


def sample_targets():
    """What `snakemake samples` makes."""
    if not prompt_files():
        raise WorkflowError("samples: no prompts; set sample_prompts (config/sample_prompts.txt is an example)")
    return [*first_targets(), SHEET]


def first_targets():
    """What every target wants beside its own files."""
    return [*(DEMO_FILES if demo_paths() else []), f"results/check/{DATASET}.txt"]


def transient_manifests():
    """The manifests whose cache files go once training is done with them."""
    return [*([] if KEEP_LATENTS else [LATENTS]), *([] if KEEP_TEXTS else [TEXTS])]
