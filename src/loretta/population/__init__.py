"""Many adapters of one kind, trained at once on one frozen base."""
