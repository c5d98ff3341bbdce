"""The network: load, adapt, sample, score, differentiate."""

__all__: list[str] = []
