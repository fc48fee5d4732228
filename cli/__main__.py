"""`python -m calotype.cli`."""

from calotype.cli import main

if __name__ == "__main__":
    main()
