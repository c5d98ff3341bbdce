"""A run from its recipe to its folder."""

__all__: list[str] = []
