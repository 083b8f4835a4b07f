#!/bin/bash
# Install the Debian or Ubuntu packages of a tier of tests, as root. Does nothing where they are there already.
#
#   install_packages.sh "The Slurm tests" tests/slurm/install.sh "sbatch squeue" slurm-wlm ...
#                       what is skipped   to say what to run     needed commands packages
set -euo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive
what=$1 script=$2
read -ra commands <<<"$3"
packages=("${@:4}")

missing=()
for command in "${commands[@]}"; do command -v "$command" >/dev/null || missing+=("$command"); done
[ ${#missing[@]} = 0 ] && exit 0

give_up() {                                  # a skipped tier is fine on a laptop, never in CI
  echo "$what will be skipped: $1. To enable them, on Debian or Ubuntu: sudo $script" >&2
  [ "${CI:-}" = true ] && exit 1
  exit 0
}
[ "$(id -u)" = 0 ] || give_up "not root, and these are not installed: ${missing[*]}"
command -v apt-get >/dev/null || give_up "no apt-get here, and these are not installed: ${missing[*]}"

# Keep the packages' own daemons from starting while they are configured.
if [ ! -e /usr/sbin/policy-rc.d ]; then
  printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod 755 /usr/sbin/policy-rc.d
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
log=/tmp/tinker-hpc-apt.log
if ! apt-get install -y --no-install-recommends "${packages[@]}" >"$log" 2>&1; then
  { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; } >>"$log" 2>&1 ||
    { tail -5 "$log" >&2; give_up "apt-get could not install ${packages[*]} (log: $log)"; }
fi
