"""All that touches private parts of Ray."""
