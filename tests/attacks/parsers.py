"""Every parser of this project that reads what others wrote: how to call it, what it may raise, and sound examples."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image

from qwen_image.adapter.files import read_adapter
from qwen_image.bounded import parse_json, parse_toml, parse_yaml
from qwen_image.cache.manifest import LATENT_COLUMNS, TEXT_COLUMNS, read_manifest
from qwen_image.config import check_config, load_config, resolve_config
from qwen_image.container import DTYPE_BYTES, ContainerError, read_header
from qwen_image.dataset.config import DatasetSettings, load_dataset_config
from qwen_image.dataset.images import ImageError, image_size, load_image
from qwen_image.dataset.items import list_items, read_captions
from qwen_image.dataset.keys import KEYS
from qwen_image.dataset.listing import Item
from qwen_image.files import FileMemo
from qwen_image.lock.archive import Member, table_text
from qwen_image.lock.from_lora import known_images, rows_of_lora
from qwen_image.lock.plan import CONFIG_FILE, Sources, plan_from_lock, threads
from qwen_image.lock.rows import HEAD as HEAD_OF_LOCK
from qwen_image.lock.rows import Rows, read_lock
from qwen_image.lock.unpack import unpack
from qwen_image.models.checkpoint import check_checkpoint
from qwen_image.models.locate import locate
from qwen_image.models.recognise import LAYOUT_ANCHORS
from qwen_image.models.tokenizer import check_tokenizer
from qwen_image.problems import InputError
from qwen_image.runs.table import key_problems
from qwen_image.sampling.prompts import load_prompts
from qwen_image.training.arguments import parse_arguments
from qwen_image.training.state import DAMAGED, list_states
from qwen_image.training.trackers import tracker_options
from qwen_image.training.tree import read_tree

DEFAULTS = {name: key.default for name, key in KEYS.items() if not key.ignored}


@dataclass(frozen=True)
class Parser:
    """A parser and what it is to be fed with."""

    name: str
    file: str
    """Name of the file that the input is written to."""
    read: Callable[[Path], object]
    refuses: tuple[type[Exception], ...]
    """What it may raise. Anything else is a bug."""
    examples: tuple[bytes, ...]
    """Sound inputs, to be damaged."""
    words: tuple[bytes, ...] = ()
    """What its format gives a meaning to."""


def settings(**keys: object) -> DatasetSettings:
    """Return the settings of a dataset."""
    return DatasetSettings(**DEFAULTS | {"index": 0, "cache_directory": "cache", "caption_extension": ".txt"} | keys)


def container(header: object, data: bytes = b"") -> bytes:
    """Return a safetensors file; the header is given as bytes or as what JSON makes of it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def picture(kind: str) -> bytes:
    """Return a small picture of this format."""
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(stream, kind)
    return stream.getvalue()


def _header(path: Path) -> None:
    """Whatever is accepted must be readable by the reference reader, which reads the weights later."""
    from safetensors import safe_open

    header = read_header(path)
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(header.tensors)
        assert (file.metadata() or {}) == header.metadata
        for name, info in header.tensors.items():
            assert tuple(file.get_slice(name).get_shape()) == info.shape


def _header_by_itself(path: Path) -> None:
    """Read a file of this header, as long as it says, and of as much data as the examples need."""
    raw = path.read_bytes()
    for size in (0, 8):
        path.write_bytes(container(raw, bytes(size)))
        try:
            return _header(path)
        except ContainerError as error:
            refused = error
    raise refused


def _config(path: Path) -> None:
    config = load_config(path)
    if problems := check_config(config, str(path)):
        raise InputError(problems)
    json.dumps(resolve_config(config))


def _jsonl(path: Path) -> list[str]:
    reasons = []
    for several in (False, True):
        listing = list_items(settings(image_jsonl_file=str(path), multiple_captions=several))
        reasons += [reject.reason for reject in listing.rejects]
        for item in listing.items:
            assert all("\0" not in text for text in read_captions(item, settings()))
    return reasons


def _caption(path: Path) -> None:
    item = Item(0, "a.png", "a.png", str(path), None)
    for several in (False, True):
        assert read_captions(item, settings(multiple_captions=several))


def _image(path: Path) -> None:
    width, height = image_size(path)
    pixels = load_image(path)
    assert pixels.shape == (height, width, 3)
    assert pixels.dtype == numpy.uint8


def _key_values(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    for key in ("network_args", "optimizer_args", "lr_scheduler_args"):
        parse_arguments([f"--{key}", *text.split("\n")])


def _memo(path: Path) -> None:
    assert FileMemo(path, lambda values: False).value(path, lambda path: [1]) == [1]


def _manifest(path: Path) -> None:
    for columns in (LATENT_COLUMNS, TEXT_COLUMNS):
        rows = read_manifest(path, columns).to_dict("records")
        assert not any(".." in row["cache_file"].split("/") or row["cache_file"].startswith("/") for row in rows)


def _model_config(path: Path) -> list:
    names = LAYOUT_ANCHORS["vae", "diffusers"]
    tensors = {
        name: {"dtype": "F32", "shape": [], "data_offsets": [4 * number, 4 * number + 4]}
        for number, name in enumerate(names)
    }
    path.with_name("diffusion_pytorch_model.safetensors").write_bytes(container(tensors, bytes(12)))
    return check_checkpoint(path.parent, "vae")


def _runs(path: Path) -> None:
    problems = key_problems({"runs": str(path), "dit": "a"}, "my.yaml")
    if problems:
        raise InputError(problems)


def _account(path: Path) -> None:
    rows = rows_of_lora(path, {key: Path(key) for key in ("dit", "vae", "text_encoder")})
    _plan(rows | known_images(rows, [path.parent]), path)


def _lock(path: Path) -> None:
    _plan(read_lock(path), path)


def _plan(rows: Rows, path: Path) -> None:
    """Nothing that is planned is outside of the folder, and its configuration is one that Snakemake runs nothing of."""
    plan = plan_from_lock(rows, Sources(path.parent, {}), {})
    assert not any(place.startswith("/") or ".." in place.split("/") for place in (*plan.files, *plan.links))
    assert not any(str(key).startswith("__") for key in parse_yaml(plan.files[CONFIG_FILE]))
    threads(rows)


def _archive(path: Path) -> None:
    unpack(path, path.parent / "unpacked")


def archive(*members: tuple[str, bytes]) -> bytes:
    """Return an archive of a cache with these members, its table first."""
    table = table_text(Member(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in members).encode()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in [("table.tsv", table), *members]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _state(path: Path) -> None:
    list_states(path.parent.parent, "lora")


TABLE = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
EMPTY = {"dtype": "U8", "shape": [0, 0], "data_offsets": [0, 0]}
STATE = {
    "step": 3, "epoch": 1, "skipped_steps": 0, "recent_losses": [0.5], "best_validation": None,
    "made_from": {"seed": 1}, "kept": True, "version": 1,
}  # fmt: skip
LORA = {
    "__metadata__": {"lora_adapter_metadata": '{"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"a": 2}}'},
    "transformer.a.lora_A.weight": TABLE,
    "transformer.a.lora_B.weight": TABLE | {"shape": [1, 2], "data_offsets": [8, 16]},
}
TREE = {"tree": json.dumps({"dict": [["a", {"tensor": "0"}], [{"tuple": [1, 2]}, {"list": [0.5, None]}]]})}
ACCOUNT = {
    f"qwen_image.{key}": json.dumps(value)
    for key, value in {
        "settings": {"output_name": "a", "dataset_config": "d.toml", "dit": "dit", "seed": 1},
        "datasets": [{"image_directory": "i", "cache_directory": "c", "caption_extension": ".txt"}],
        "num_processes": 1,
        "inputs": {
            "dit": "0",
            "latents": {"model": "0"},
            "vae": "0",
            "text_encoder_outputs": {"model": "0", "weights": "bfloat16"},
        },
    }.items()
}
LOCK = f"""{HEAD_OF_LOCK}config\tsetting\tcaching_shards\t2
config\tsetting\tdataset_config\t"d.toml"
config\tsetting\tdit\t"dit.safetensors"
config\tsetting\toutput_dir\t"out"
config\tsetting\toutput_name\t"a"
config\tsetting\ttext_encoder\t"te"
config\tsetting\tvae\t"vae.safetensors"
dataset cats\t[0]\tsetting cache_directory\t"cache"
dataset cats\t[0]\tsetting caption_extension\t".txt"
dataset cats\t[0]\tsetting image_directory\t"cats"
dataset cats\t[0] sam.png\tleft out\tnot usable
dataset cats\t[0] tom.jpg\timage\tab
dataset cats\tfile\tplace\td.toml
device\ttrain a\tcomputed on\tcpu, 2 threads
model\tte/model.safetensors\tsha256\tab
run a\torder\tnumber\t2
run a\tsetting\tlearning_rate\t0.1
run a\tsetting\toutput_name\t"a"
run b\torder\tnumber\t1
run b\tsetting\toutput_name\t"b"
"""
ROW = b"0\ta.png\ta_0064x0064_qi.safetensors\t64\t64\t64\t64\tbfloat16\tab\tcd\tdeterministic\t5\tef\n"
HEAD = "\t".join({**LATENT_COLUMNS, **TEXT_COLUMNS}).encode() + b"\n"
TOML = (b"[", b"]", b"[[", b"=", b'"', b"'", b'"""', b"{", b"}", b".", b",", b"\n", b"0x", b"inf", b"nan", b"1e999",
        b"9" * 400, b"9" * 5000, b"0x" + b"f" * 99, b"1979-05-27", b"true", b"#", b"\\u0000", b"\\ud800", b"\xff",
        b"[" * 60, b"a." * 60)  # fmt: skip
JSON = (b"[", b"]", b"{", b"}", b'"', b":", b",", b"\n", b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000,
        b"null", b"true", b"\\u0000", b"\\ud800", b"\xff", b"[" * 60, b'{"a":' * 60)  # fmt: skip
YAML = (b"[", b"]", b"{", b"}", b":", b": ", b"- ", b"\n", b"&a ", b"*a", b"<<: *a", b"!!int ", b"!!float ",
        b"!!bool ", b"!!binary ", b"!!timestamp ", b"!!set ", b"!!omap ", b"!!python/object/apply:os.system ", b"? ",
        b"|", b">", b"%", b"1e999", b".nan", b"9" * 5000, b"0x" + b"f" * 99, b"2001-99-99", b"1:99:99", b"\\x00",
        b"---\n", b"\xff", b"[" * 60)  # fmt: skip
SAFETENSORS = (*JSON, b'"dtype":', b'"shape":', b'"data_offsets":', b'"BF16"', b'"I64"', b'"__metadata__":', b"0",
               b"9223372036854775807", b"-1", b"1.0", *(f'"{dtype}"'.encode() for dtype in DTYPE_BYTES))  # fmt: skip

PARSERS = [
    Parser(
        "dataset TOML", "dataset.toml", load_dataset_config, (InputError,),
        (
            b'[general]\nresolution = [64, 32]\ncaption_extension = ".txt"\n[[datasets]]\nimage_directory = "a"\n',
            b'[[datasets]]\nimage_jsonl_file = "a.jsonl"\ncache_directory = "c"\nloss_weight = 0.5\nnum_repeats = 2\n',
        ),
        (*TOML, b"[general]", b"[[datasets]]", *(f"\n{key} = ".encode() for key in KEYS)),
    ),
    Parser(
        "dataset JSON", "dataset.json", load_dataset_config, (InputError,),
        (b'{"general": {"resolution": 64}, "datasets": [{"image_directory": "a", "caption_extension": ".txt"}]}',),
        (*JSON, b'"general":', b'"datasets":', *(f'"{key}":'.encode() for key in KEYS)),
    ),
    Parser(
        "dataset JSONL", "dataset.jsonl", _jsonl, (InputError,),
        (
            b'{"image_path": "a.png", "caption": "a cat"}\n{"image_path": "b.png", "caption": ["a", "b"]}\n',
            '\ufeff{"image_path": "ü/../a.png", "caption": "\\u00e9"}\r\n\n'.encode(),
        ),
        (*JSON, b'"image_path":', b'"image_path_0":', b'"caption":', b"../", b"/dev/null", b"\xe2\x80\xa8"),
    ),
    Parser(
        "configuration YAML", "my.yaml", _config, (InputError,),
        (
            b"dataset_config: d.toml\ndit: a\nvae: b\ntext_encoder: c\noutput_dir: o\noutput_name: n\nseed: 1\n",
            b"learning_rate: 1e-4\nmixed_precision: no\noptimizer_args: [a=1, &a b=2, *a]\nbase_weights: [x]\n",
        ),
        (*YAML, b"\nlearning_rate: ", b"\nmax_train_steps: ", b"\ngpu_ids: ", b"\nnetwork_args: ", b"\nlog_with: "),
    ),
    Parser("caption file", "a.txt", _caption, (ValueError,), (b"a cat\n", "\ufeffzwei\r\n\u2028Zeilen\n".encode()),
           (b"\0", b"\xff", b"\r", b"<|im_end|>")),
    Parser(
        "safetensors header", "a.safetensors", _header, (ContainerError, OSError),
        (
            container({"a": TABLE, "b": TABLE | {"data_offsets": [8, 16]}, "__metadata__": {"k": "v"}}, bytes(16)),
            container({"a": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}, b"1"),
        ),
        SAFETENSORS,
    ),
    Parser(
        "safetensors header of the right length", "a.safetensors", _header_by_itself, (ContainerError, OSError),
        (
            json.dumps({"__metadata__": {"caption \u00e9": "a cat \U0001f408, a dog " * 3}, "a": TABLE}).encode(),
            json.dumps({"a": EMPTY}).encode(),
            json.dumps({"a": EMPTY | {"x": [0, "", [[], {}, [0, 0]]]}, "b": EMPTY}).encode(),
        ),
        # few words, so that each stands often where it is JSON
        (b"-0", b"1e999", b"1.0", b"NaN", b"\\udc00", b"\\ud800", b"[" * 130 + b"]" * 130, b'"x": 0, '),
    ),
    Parser(
        "manifest TSV", "latents.tsv", _manifest, (InputError,),
        (HEAD + ROW, HEAD + ROW.replace(b"a.png", b'"a\tb\nc.png"')),
        (b"\t", b"\n", b"\r", b'"', b"\0", b"\xff", b"9" * 30, b"-1", b"nan", b"../", b"cache_file", ROW),
    ),
    Parser(
        "prompts, text", "prompts.txt", load_prompts, (InputError,),
        (b"# note\na fox --w 512 --h 256 --d 7 --s 4 --l 2.5 --n blurry\nb \\--n c\n",),
        (b" --w ", b" --d ", b" --fs ", b" --i ", b" --x ", b"=", b"\n", b"\\--", b"9" * 5000, b"1e999", b"\xff"),
    ),
    Parser(
        "prompts, TOML", "prompts.toml", load_prompts, (InputError,),
        (b'[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a"\nseed = 3\n[[prompt.subset]]\nprompt = "b"\n',),
        (*TOML, b"[[prompt.subset]]", b"cfg_scale = ", b"sample_steps = "),
    ),
    Parser(
        "prompts, JSON", "prompts.json", load_prompts, (InputError,),
        (b'["a fox --w 64", {"prompt": "b", "seed": 3, "cfg_scale": 2.0, "negative_prompt": null}]',),
        (*JSON, b'"prompt":', b'"width":', b'"cfg_scale":', b'"discrete_flow_shift":'),
    ),
    Parser(
        "training TOML", "config.toml", lambda path: parse_arguments(["--config_file", str(path)]), (InputError,),
        (b'dit = "a"\n[x]\nlearning_rate = 1e-4\nseed = 3\noptimizer_args = ["a=1"]\ngradient_checkpointing = true\n',),
        (*TOML, b"\nmax_train_steps = ", b"\nbase_weights = ", b"\nnetwork_args = ", b"\nlr_warmup_steps = "),
    ),
    Parser(
        "key=value arguments", "arguments.txt", _key_values, (InputError,),
        (b"conv_dim=4\nrank_dropout=0.1", b"weight_decay=0.1\nbetas=(0.9, 0.99)", b"exclude_patterns=['a=b', r'.*']"),
        (b"=", b"(", b"[", b"{", b"{{", b"}}", b"'", b'"""', b"-", b"**", b"9" * 400, b"9" * 5000, b"1e999", b"nan",
         b"None", b"\0", b"__import__('os').system('touch canary')", b"\\N{x}", b"(" * 99, b"{1:" * 99),
    ),
    Parser("tracker TOML", "log.toml", tracker_options, (InputError,),
           (b'[wandb]\nproject = "a"\ntags = ["b"]\n[tensorboard]\nmax_queue = 3\n',),
           (*TOML, b"[wandb]", b"api_key = ")),
    Parser("tree of a state", "optimizer.safetensors", read_tree, DAMAGED,
           (container({"__metadata__": TREE, "0": TABLE}, bytes(8)),),
           (*SAFETENSORS, b"\\\"dict\\\"", b"\\\"tensor\\\"", b"\\\"list\\\"", b"\\\"tuple\\\"")),
    Parser("facts of a state", "lora-state/state.json", _state, (), (json.dumps(STATE).encode(),),
           (*JSON, b'"step":', b'"kept":', b'"version":')),
    Parser("adapter", "lora.safetensors", read_adapter, (InputError,), (container(LORA, bytes(16)),),
           (*SAFETENSORS, b"lora_alpha", b"alpha_pattern", b"\\\"")),
    Parser("index of shards", "model.safetensors.index.json", lambda path: locate(path, "dit"), (InputError,),
           (b'{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}',), (*JSON, b'"weight_map":', b"../", b"/")),
    Parser("model's config", "vae/config.json", _model_config, (), (b'{"_class_name": "AutoencoderKLQwenImage"}',),
           (*JSON, b'{"_class_name": "AutoencoderKLQwenImage"}')),
    Parser("tokenizer", "tokenizer.json", lambda path: check_tokenizer(path.parent, path.parent), (),
           (b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<|im_end|>", "id": 1}]}',),
           (*JSON, b'"vocab":', b'"added_tokens":', b'"id":')),
    Parser("memo of hashes", ".latents.hashes.json", _memo, (), (b'{"a": [1, 2, 3, "ab"]}',), JSON),
    *(
        Parser(f"image, {kind}", f"a.{kind.lower()}", _image, (ImageError,), (picture(kind),),
               (b"\0" * 9, b"\xff\xff\xff\xff", b"IHDR", b"IDAT", b"iCCP", b"eXIf", b"\xff\xd8", b"\xff\xda", b"Exif"))
        for kind in ("PNG", "JPEG", "WEBP", "BMP", "AVIF", "GIF", "TIFF")
    ),
    Parser("table of runs", "runs.tsv", _runs, (InputError,),
           (b"output_name\tlearning_rate\tbase_weights\na\t1e-4\t[x, y]\nb\t\t\n",),
           (*YAML, b"\t", b'"', b"\noutput_name", b"network_args", b"\tdit", b"\0")),
    Parser("lock of a dataset", "dataset.lock", _lock, (InputError,), (LOCK.encode(),),
           (b"\t", b"\n", b"\\", b"\\t", b"\xff", b"\0", b"../", b"/", b"dataset cats\t", b"run a\tsetting\t",
            b"order\t", b"config\tsetting\t", b"__use_yte__\ttrue\n", b"runs_grid\t", b"optimizer_type\t",
            b"[0]\tsetting ", b"null", b"[9] ", b"9" * 5000, b"[" * 999, b"\\ud800", b"model\t",
            b"left out", b"results/", b"te/")),
    Parser("LoRA's own account", "lora.safetensors", _account, (InputError,),
           (container({"__metadata__": ACCOUNT, "a": TABLE}, bytes(8)),),
           (*SAFETENSORS, b'\\"output_name\\":', b'\\"dataset_config\\":', b"../", b"\\\"")),
    Parser("packed cache", "cache.tar", _archive, (InputError,),
           (archive(("datasets.json", b"{}"), ("manifests/latents.tsv", b""), ("cache/0/c/a_qi.safetensors", b"abc")),),
           (b"../", b"/", b"\0", b"cache/0/../../", b"ustar", b"0" * 11, b"7" * 11, b"1", b"2", b"datasets.json")),
    Parser("TOML itself", "any.toml", lambda path: parse_toml(path.read_text("utf-8", "replace")), (ValueError,),
           (b"a = 1\n",), TOML),
    Parser("JSON itself", "any.json", lambda path: parse_json(path.read_text("utf-8", "replace")), (ValueError,),
           (b"{}",), JSON),
    Parser("YAML itself", "any.yaml", lambda path: parse_yaml(path.read_text("utf-8", "replace")), (ValueError,),
           (b"a: &a [1, {b: c}]\nd: *a\n",), YAML),
]  # fmt: skip
