"""Runs to tables, figures and pages."""
