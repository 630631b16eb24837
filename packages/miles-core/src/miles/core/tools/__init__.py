"""Tool calls in the formats that models write them in (``miles.tool_parsers``)."""
