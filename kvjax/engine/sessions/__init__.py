"""Sessions: conversations suspended in slots, and their snapshots on the disk."""
