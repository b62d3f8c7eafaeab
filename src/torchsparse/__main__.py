"""``python -m torchsparse``: the same as the command ``torchsparse``."""

from torchsparse.cli import main

if __name__ == "__main__":
    main()
