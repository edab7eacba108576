"""`python -m suture` is the command line."""

from suture.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
