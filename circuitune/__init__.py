"""circuitune: find, explain, prove and tune the heads with which a language model calculates."""

__version__ = "0.1.0"
