"""One module for each zoo that can be built: its name, a `SUMMARY`, and `build(folder, *, seed, **options)`."""
