"""Qwen-Image LoRA training: images, captions and three checkpoints in, a LoRA out.

snakemake --cores all                            the embedded demo
snakemake --cores all --configfile my.yaml       your own data
snakemake --cores all cache_only                 the caches alone, nothing is trained
snakemake --cores all samples                    pictures of every saved checkpoint, for sample_prompts
snakemake --cores all compare                    all runs trained and ranked
snakemake --cores all lock                       everything written down in dataset.lock
snakemake --cores 1 verify                       what differs from it
"""

import os

from snakemake.utils import min_version

min_version("9.0")


# the default is the embedded demo; a configuration of the user's own replaces it and is never mixed with it
if not workflow.configfiles:

    configfile: "config/config.yaml" if os.path.exists("config/config.yaml") else f"{workflow.basedir}/config/config.yaml"


include: "rules/common.smk"
include: "rules/inputs.smk"
include: "rules/targets.smk"
include: "rules/demo.smk"
include: "rules/check.smk"
include: "rules/cache.smk"
include: "rules/train.smk"
include: "rules/sample.smk"
include: "rules/compare.smk"
include: "rules/lock.smk"
include: "rules/cluster.smk"
include: "rules/report.smk"


rule all:
    default_target: True
    input:
        final_targets(),


rule cache_only:
    input:
        cache_targets(),


rule samples:
    input:
        lambda wildcards: sample_targets(),


rule compare:
    input:
        compare_targets(),
