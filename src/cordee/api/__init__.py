"""HTTP adapters over the service's one internal stream of chunks."""
