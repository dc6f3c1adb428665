"""Run the command `regraft` as `python -m regraft`."""

from regraft.cli.app import main

main()
