"""Where programs run that nobody trusts."""

__all__: list[str] = []
