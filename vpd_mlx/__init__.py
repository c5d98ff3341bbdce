"""vpd-mlx: teach small language models from language feedback, on MLX."""

__version__ = "0.1.0"

__all__ = ["__version__"]
