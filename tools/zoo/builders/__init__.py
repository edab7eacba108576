"""One module for each zoo that can be built, with a function `build(folder, *, seed, **options)`."""
