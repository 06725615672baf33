"""Text turned into token shards."""
