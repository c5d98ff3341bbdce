"""What people see of a run: `live` in the terminal, `page` as HTML, `services` at logging services.

A page is gathered by `page`, drawn by `plots`, and written by the templates (`page.html` is the frame, `run.html` and
`comparison.html` fill it); `browser.js` lets its reader filter the rollouts. Pages read a run's folder and nothing else.
"""

__all__: list[str] = []
