"""What all other packages use: settings, files, text, statistics, seeds. Of this package it imports only `errors`."""

__all__: list[str] = []
