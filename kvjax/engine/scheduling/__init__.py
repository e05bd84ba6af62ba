"""Scheduling: the policy of what runs next, the work that it gives out, and the thread that executes it."""
