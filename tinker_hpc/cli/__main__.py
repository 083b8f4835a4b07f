"""`python -m tinker_hpc.cli`: the same as `tinker-hpc`, where scripts are not on PATH."""

from tinker_hpc.cli.main import main

main()
