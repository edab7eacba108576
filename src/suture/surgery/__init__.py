"""Representation Surgery."""
