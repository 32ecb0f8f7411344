"""`python -m octavo.cli` is `octavo`, as `python -m octavo` is."""

from octavo.cli import main

if __name__ == "__main__":
    main()
