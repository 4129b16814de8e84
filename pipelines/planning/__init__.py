"""From rows to numbered shards of image requests."""
