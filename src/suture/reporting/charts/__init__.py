"""The figures of a run, one function each: `suture.reporting.figures.figure` registers it for page and files."""
