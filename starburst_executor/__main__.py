"""`python -m starburst_executor`: the command line."""

from starburst_executor.cli.main import main

if __name__ == "__main__":
    main()
