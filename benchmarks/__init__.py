"""Side-by-side measurements of time and memory; see run.py."""
