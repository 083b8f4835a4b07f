#!/bin/bash
# Install what the Slurm tests need, on Debian or Ubuntu, as root. Does nothing where it is installed already.
#
#   sudo tests/slurm/install.sh
#
# No service is started or enabled: cluster.sh starts its own daemons in namespaces of their own.
exec "$(dirname "$0")/../install_packages.sh" "The Slurm tests" tests/slurm/install.sh \
  "slurmctld slurmd slurmdbd sbatch squeue sacct munged mariadbd mariadb-install-db sshd ssh-keygen pgrep" \
  slurm-wlm slurmdbd munge mariadb-server openssh-server procps
