"""Generate functions: how one sample's response is made (``miles.generators``)."""
