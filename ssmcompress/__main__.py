"""`python -m ssmcompress` is the command line."""

from ssmcompress.cli import main

main()
