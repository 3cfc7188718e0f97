"""`python -m rondo` takes the same words as `rondo`, so launchers and debuggers can be used."""

from rondo.cli import entry

if __name__ == "__main__":
    entry()
