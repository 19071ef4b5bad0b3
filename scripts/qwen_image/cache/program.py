"""What the command lines of the caching programs have in common."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

from qwen_image.cache.shards import shard_manifest
from qwen_image.cache.stage import Stage
from qwen_image.cache.text_encoder_outputs import TextEncoderStage
from qwen_image.cache.update import CacheOptions, update_cache
from qwen_image.dataset.config import load_dataset_config
from qwen_image.dataset.items import list_datasets
from qwen_image.files import FileMemo, safe_name
from qwen_image.models.checkpoint import check_checkpoint, checkpoint_files
from qwen_image.models.identity import model_identity
from qwen_image.models.tokenizer import check_tokenizer, tokenizer_files
from qwen_image.problems import InputError, Problem


def cache_parser(description: str, *, batch_size: int) -> argparse.ArgumentParser:
    """Return a parser with the options of a dataset's two programs; each adds its checkpoint's."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--dataset_config", required=True, help="dataset file, .toml or .json")
    add_encoding_options(parser, batch_size=batch_size)
    parser.add_argument("--adopt_existing", action="store_true", help="take over musubi-tuner's files that fit")
    parser.add_argument("--shard", type=_positive, default=1, help="which part of the items to do, from 1 on")
    parser.add_argument(
        "--num_shards",
        type=_positive,
        default=1,
        help="how many there are (merge_manifests.py joins their tables)",
    )
    parser.add_argument("--on_bad_item", choices=["error", "skip"], default="error", help="once the rest is cached")
    parser.add_argument(
        "--cache_subfolder", type=subfolder_name, default="", help="folder in the cache directories for the files"
    )
    parser.add_argument("--manifest", type=Path, help="table of the cache files (default: under results/manifests)")
    parser.add_argument("--rejects", type=Path, help="table of the items left out (default: beside the manifest)")
    return parser


def add_encoding_options(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """Add what may be said of any encoding: where it runs, how much at once, and which files may stay."""
    parser.add_argument(
        "--device", type=device_name, default="auto", help="cpu, cuda, cuda:N, or auto: the GPU if there is one"
    )
    parser.add_argument("--batch_size", type=_positive, default=batch_size, help="items encoded together")
    parser.add_argument("--num_workers", type=_positive, default=8, help="helpers, never more than the CPUs allow")
    parser.add_argument("--skip_existing", action="store_true", help="keep files whose fingerprint is right")
    parser.add_argument("--keep_cache", action="store_true", help="keep files of items that are asked for no more")
    parser.add_argument(
        "--deterministic", action="store_true", help="bytes that depend on the item, the model and the settings alone"
    )


def add_text_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Add the text encoder's own options."""
    parser.add_argument("--text_encoder", required=True, help="Qwen2.5-VL: a .safetensors file, an index or a folder")
    parser.add_argument("--tokenizer", help="tokenizer folder, when the text encoder's has none")
    parser.add_argument("--fp8_vl", action="store_true", help="store the linear weights in fp8, compute in bf16")


def text_encoder_stage(args: argparse.Namespace, folder: Path) -> TextEncoderStage:
    """Return the stage of these options; the hash of the model is remembered in `folder`. Raises InputError."""
    if problems := [
        *check_checkpoint(args.text_encoder, "text_encoder"),
        *check_tokenizer(args.text_encoder, args.tokenizer),
    ]:
        raise InputError(problems)
    # the tokenizer's own thread pool, read when it is first imported
    os.environ["RAYON_NUM_THREADS"] = str(usable_workers(args.num_workers))
    files = [
        *checkpoint_files(args.text_encoder, "text_encoder"),
        *tokenizer_files(args.text_encoder, args.tokenizer),
    ]
    return TextEncoderStage(
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
        model_identity=model_identity(files, folder),
        fp8=args.fp8_vl,
        device=args.device,
        batch_size=args.batch_size,
        deterministic=args.deterministic,
    )


def cache_options(args: argparse.Namespace, kind: str) -> CacheOptions:
    """Return the options of a stage of this kind (``latents`` or ``text_encoder_outputs``). Raises InputError."""
    problems = []
    if args.shard > args.num_shards:
        found = f"found {args.shard}, with --num_shards {args.num_shards}"
        problems.append(Problem(file="command line", key="--shard", found=found, mend="count from 1 to --num_shards"))
    if args.adopt_existing and args.deterministic:
        mend = "give one of them: nobody knows how another program's bytes came about"
        problems.append(Problem(file="command line", key="--adopt_existing", found="with --deterministic", mend=mend))
    if problems:
        raise InputError(problems)
    manifest = args.manifest or _default_manifest(args, kind)
    return CacheOptions(
        skip_existing=args.skip_existing,
        keep_cache=args.keep_cache,
        deterministic=args.deterministic,
        adopt_existing=args.adopt_existing,
        on_bad_item=args.on_bad_item,
        shard=args.shard,
        num_shards=args.num_shards,
        subfolder=args.cache_subfolder,
        manifest=manifest,
        rejects=args.rejects or manifest.with_suffix(".rejects.tsv"),
    )


def _default_manifest(args: argparse.Namespace, kind: str) -> Path:
    whole = manifest_path(args.dataset_config, kind)
    # one shard's table must not pass for the dataset's; merge_manifests.py puts them together
    return whole if args.num_shards == 1 else shard_manifest(whole, args.shard, args.num_shards)


def manifest_path(dataset_config: str, kind: str) -> Path:
    """Return where a dataset's manifest lies, relative to the working directory."""
    return Path("results/manifests", safe_name(Path(dataset_config).stem), f"{kind}.tsv")


def bring_up_to_date(stage: Stage, dataset_config: str, options: CacheOptions) -> None:
    """Run the stage on every dataset of the file."""
    settings = load_dataset_config(dataset_config)
    update_cache(stage, zip(settings, list_datasets(settings, dataset_config), strict=True), options)


def usable_workers(asked: int) -> int:
    """Return the number of threads to use: as many as asked for, as far as this process has CPUs for them."""
    # not every system tells which CPUs a process may use
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(asked, cpus))


def open_memo(options: CacheOptions, kind: str, is_valid: Callable[[list], bool]) -> FileMemo:
    """Return the memo of the images' hashes beside the manifest. It may be deleted at any time."""
    return FileMemo(options.manifest.with_name(f".{kind}.hashes.json"), is_valid)


def device_name(text: str) -> str:
    """Return a device's name. Raises ArgumentTypeError for anything else."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is not cpu, cuda, cuda:N or auto")
    return text


def subfolder_name(text: str) -> str:
    """Return the name of a subfolder. Raises ArgumentTypeError for one that leads elsewhere."""
    if text and text != safe_name(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name; use letters, digits, `.`, `_` and `-`")
    return text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
