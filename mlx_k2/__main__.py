"""Entry of ``python -m mlx_k2``: the command ``mlx-k2`` where its script is not on the PATH."""

from mlx_k2.cli.main import main

if __name__ == "__main__":
    main()
