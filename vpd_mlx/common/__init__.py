"""What every other room stands on: settings, files, text, statistics, seeds. Imports nothing of the package but `errors`."""

__all__: list[str] = []
