"""`python -m fedveil` is `fedveil`."""

from .cli import main

main()
