#!/usr/bin/env bash
# Trains on every host of a Cloud TPU slice. Untried on a slice; a test runs it with hosts that are local processes.
#
# Run it on your own machine, from the root of this repository, with the slice created and the same NFS share mounted on
# all of its hosts:
#
#   TPU_NAME=my-slice ZONE=europe-west4-b SHARED=/mnt/shared docs/launch/tpu_pod.sh --config=configs/cifar10.py
#
# Run it again and it goes on from the last checkpoint.
set -euo pipefail

: "${TPU_NAME:?name of the TPU slice}" "${ZONE:?its zone}" "${SHARED:?folder that all of its hosts share}"
[ $# -gt 0 ] || { echo "usage: $0 --config=FILE [--config.group.key=VALUE ...]" >&2; exit 2; }

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"
}

# The package goes to the shared folder once; each host installs it for itself. The hosts need Python 3.11 or newer,
# which Ubuntu 22.04 has beside its own.
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD -- jem_jax configs setup.cfg pyproject.toml README.md LICENSE
gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:$SHARED/jem_jax.tar.gz" --zone="$ZONE" --worker=0
on_all_hosts "
  set -e
  sudo apt-get install --yes --quiet python3.11-venv
  rm -rf ~/jem_jax && mkdir ~/jem_jax && tar xzf $SHARED/jem_jax.tar.gz -C ~/jem_jax
  python3.11 -m venv ~/jem_jax/.venv
  ~/jem_jax/.venv/bin/pip install --quiet -e ~/jem_jax'[tpu]'
"

# JAX finds the other hosts of the slice.
printf -v arguments ' %q' "$@"
on_all_hosts "
  cd ~/jem_jax
  export JAX_COMPILATION_CACHE_DIR=$SHARED/xla
  exec .venv/bin/jem-jax --distributed --workdir=$SHARED/runs/$TPU_NAME --config.data.data_dir=$SHARED/data $arguments
"
