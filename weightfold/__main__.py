"""Run the command line: `python -m weightfold`."""

from weightfold.cli.main import main

if __name__ == "__main__":
    main()
