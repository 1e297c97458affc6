"""Ray clusters: what they have, how they are joined, and jobs on them."""
