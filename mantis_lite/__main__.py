"""`python -m mantis_lite`."""

from .cli import main

main()
