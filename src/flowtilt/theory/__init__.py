"""The papers' guarantees in numbers: exact steps on finite distributions, and closed forms, in float64.

Nothing here imports torch or has networks.
"""
