"""Tools around a run: the lab, exports, the doctor and its self-test."""

__all__: list[str] = []
