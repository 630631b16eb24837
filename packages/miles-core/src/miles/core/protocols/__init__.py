"""What the parts of Miles expect of each other.  A protocol per plug; implementations are found by entry point."""
