"""The papers' guarantees in numbers: exact steps on finite distributions, in float64 and without networks.

Nothing here imports torch; both studies start and end in seconds.
"""
