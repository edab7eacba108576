from importlib.util import find_spec

# The compiled loops cannot be imported without numba; the plain path beside them can be tested without it.
collect_ignore = [] if find_spec("numba") else ["src/suture/merging/compiled/loops.py"]
