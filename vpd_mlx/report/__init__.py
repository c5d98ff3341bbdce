"""What people see of a run: `live` in the terminal, `page` as HTML, `services` at logging services.

A page is gathered by `page` and `browse`, drawn by `plots` and `chart`, and written by the templates (`page.html` is the frame,
`run.html` and `comparison.html` fill it). Of its scripts `answers.js` has the held-out problems, `browser.js` the rollouts,
`chart.js` reads and zooms the plots, `common.js` has what they share. Pages read a run's folder and nothing else.
"""

__all__: list[str] = []
