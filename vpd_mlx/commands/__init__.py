"""One file per command; `app` registers them."""

__all__: list[str] = []
