"""`python -m tokenprune`: the command line, where the console script is not on the path."""

from tokenprune.cli import main

if __name__ == "__main__":
    main()
