"""`python -m weightfold.cli`: the command line without an installed script."""

from weightfold.cli.main import main

if __name__ == "__main__":
    main()
