"""``python -m loretta``: the command line."""

from loretta.cli.main import main

main()
