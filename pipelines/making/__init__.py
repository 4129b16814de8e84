"""Engines in actor pools, and the shards that they make."""
