"""Report: run records to one self-contained HTML page with plots.

`runs` reads folders, `results`, `allocation` and `reproduce` turn records into rows and sentences, `plots` draws,
`figures` and `simulation` say what is drawn, `page` puts all of it into `template.html`.
"""

from besa.report.page import render
from besa.report.runs import Run, load_run, load_runs

__all__ = ["Run", "load_run", "load_runs", "render"]
