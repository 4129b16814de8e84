"""From a source (path, URL, hub id) to filled networks, and from one layout of a checkpoint to the other."""
