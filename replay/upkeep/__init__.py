"""What keeps a store whole, small and tidy: recover, verify, compact, evict, collect garbage, copy."""
