"""`python -m attnzoo` is `attnzoo`."""

from attnzoo.cli.app import main

main()
