"""Types, configuration, loss mathematics, driver and command line of Miles."""

__version__ = "0.1.0"
