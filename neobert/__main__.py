"""`python -m neobert`, the same as the `neobert` command."""

from neobert.cli import main

main()
