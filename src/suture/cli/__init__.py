"""The command line. It adds no feature: every verb is one public Python call with the same name."""
