"""`python -m data_prep STEP --data D`: run one step, or `all`."""

from data_prep.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
