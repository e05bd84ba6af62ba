"""The KV cache as a durable asset: chunks of KV in tiers, found by what was read, verified before they are used.

It knows bytes and keys, never models: what a chunk looks like comes from whoever opens the store.
"""
