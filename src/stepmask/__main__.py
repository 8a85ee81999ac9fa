"""`python -m stepmask`: the command line."""

from stepmask.cli import main

if __name__ == "__main__":
    main()
