"""One file per command beyond the first ones; `cli` registers them."""

__all__: list[str] = []
