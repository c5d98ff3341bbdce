"""A run folder as a page, in the terminal, beside other runs. Reads files only; `runs` reads, `plots` draws, `page` writes."""

__all__: list[str] = []
