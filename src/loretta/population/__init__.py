"""Many adapters of one kind, the members, trained at once on one frozen base."""
