#!/bin/bash
# Install what the Slurm tests need, on Debian or Ubuntu, as root. Does nothing where it is installed already.
#
#   sudo tests/slurm/install.sh
#
# No service is started or enabled: cluster.sh starts its own daemons in namespaces of their own.
set -euo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive
PACKAGES=(slurm-wlm slurmdbd munge mariadb-server openssh-server procps)
COMMANDS=(slurmctld slurmd slurmdbd sbatch squeue sacct munged mariadbd mariadb-install-db sshd ssh-keygen pgrep)

missing=()
for command in "${COMMANDS[@]}"; do command -v "$command" >/dev/null || missing+=("$command"); done
[ ${#missing[@]} = 0 ] && exit 0

give_up() {                                  # a skipped tier is fine on a laptop, never in CI
  echo "The Slurm tests will be skipped: $1. To enable them, on Debian or Ubuntu: sudo tests/slurm/install.sh" >&2
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
if ! apt-get install -y --no-install-recommends "${PACKAGES[@]}" >/tmp/tinker-hpc-apt.log 2>&1; then
  { apt-get update && apt-get install -y --no-install-recommends "${PACKAGES[@]}"; } >>/tmp/tinker-hpc-apt.log 2>&1 ||
    { tail -5 /tmp/tinker-hpc-apt.log >&2; give_up "apt-get could not install ${PACKAGES[*]} (log: /tmp/tinker-hpc-apt.log)"; }
fi
