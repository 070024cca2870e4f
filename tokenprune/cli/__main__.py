"""`python -m tokenprune.cli`, for where the console script is not installed."""

from tokenprune.cli import main

main()
