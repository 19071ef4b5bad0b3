#!/usr/bin/env bash
# Install SLURM and MUNGE for tests/cluster, which starts its own daemons: bash .ci/install_slurm.sh
# Debian or Ubuntu, as root or with sudo. Starts no service, needs no systemd, does nothing when all is there.
set -euo pipefail

# The daemons' folder is not on an ordinary user's PATH.
export PATH="$PATH:/usr/sbin:/sbin"

missing=0
for program in munged slurmctld slurmd sbatch srun squeue; do
    command -v "$program" >/dev/null || missing=1
done
if [ "$missing" -eq 0 ]; then
    echo "SLURM is installed: $(slurmctld -V)"
    exit 0
fi

sudo=()
if [ "$(id -u)" -ne 0 ]; then
    sudo=(sudo)
fi

# The packages would start a munged of their own; 101 is Debian's "not now".
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" >/dev/null
    "${sudo[@]}" chmod 755 "$policy"
    trap '"${sudo[@]}" rm -f "$policy"' EXIT
fi

apt_get=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes -o Acquire::Retries=3)
"${apt_get[@]}" update
"${apt_get[@]}" install --no-install-recommends slurm-wlm munge

slurmctld -V
