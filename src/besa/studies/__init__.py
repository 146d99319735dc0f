"""Studies: many runs, compared in tables, plots and pages."""
