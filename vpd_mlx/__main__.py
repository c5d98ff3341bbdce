"""`python -m vpd_mlx` is `vpd-mlx`."""

from vpd_mlx.commands.app import main

if __name__ == "__main__":
    main()
