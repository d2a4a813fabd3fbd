"""`python -m fusenorm` is the command `fusenorm`."""

from fusenorm.cli import main

if __name__ == "__main__":
    main()
